"""engine=auto: the native engine wherever it can run what is asked for, diffusers otherwise."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage_runner.engines.base import Engine, EngineConfig
from zimage_runner.engines.diffusers.attention import BACKENDS
from zimage_runner.engines.diffusers.config import DiffusersEngine
from zimage_runner.engines.native.config import ATTENTION_NAMES, NativeEngine
from zimage_runner.engines.precision import Precision
from zimage_runner.engines.request import LoadRequest, Needs
from zimage_runner.errors import UnsupportedCheckpoint, UserError

if TYPE_CHECKING:
    from zimage_runner.compile import Compile
    from zimage_runner.memory.policies import Memory
    from zimage_runner.model import Model

log = logging.getLogger(__name__)

COMMON_FIELDS = ("device", "batch_size", "noise_device", "precision", "attention", "threads")
"""What both engines are created with."""
COMMON_ATTENTION = ("auto", "native")
"""Backends that both engines know by the same name."""


@dataclass(kw_only=True, slots=True)
class AutoEngine(EngineConfig):
    """Native where it supports the checkpoint and what the run needs; the log says which one and why.

    A checkpoint is diffusers' only where its weights are whole and of a kind that the native engine does not compute;
    what is damaged is refused by both.
    """

    def __post_init__(self) -> None:
        if self.attention not in COMMON_ATTENTION:
            backends = {"native": ATTENTION_NAMES, "diffusers": BACKENDS}
            having = " or ".join(f"engine={name}" for name, names in backends.items() if self.attention in names)
            if not having:
                raise UserError(
                    f"engine.attention={self.attention}: no engine has such a backend: use engine.attention=auto"
                )
            raise UserError(
                f"engine.attention={self.attention} is not for engine=auto: use {having} with it, "
                "or engine.attention=auto"
            )

    def takes_native(self, model: Model, memory: Memory, compile: Compile) -> bool:
        """Whether these options are the native engine's to draw with; the checkpoint may still not be."""
        return self._why_not_native(Needs(model=model, memory=memory, compile=compile)) is None

    def needs_native(self, memory: Memory, *, pictured: bool = False) -> bool:
        """Whether what is asked for is nothing that engine=diffusers does. ``pictured``: pictures from pictures."""
        return pictured or self.precision is not Precision.bf16 or "diffusers" not in memory.engines

    def check(self, needs: Needs) -> None:
        if self.needs_native(needs.memory, pictured=needs.pictured or needs.controlled):
            NativeEngine(**self._fields()).check(needs)
        elif self._why_not_native(needs) is not None:
            DiffusersEngine(**self._fields()).check(needs)

    def create(self, request: LoadRequest) -> Engine:
        reason = self._why_not_native(request)
        if reason is None:
            try:
                return NativeEngine(**self._fields()).create(request)
            except UnsupportedCheckpoint as error:
                if self.needs_native(request.memory, pictured=request.pictured or request.controlled):
                    raise
                reason = str(error)
        log.warning("engine=auto takes diffusers: %s", reason)
        return DiffusersEngine(**self._fields()).create(request)

    def _why_not_native(self, needs: Needs) -> str | None:
        try:
            NativeEngine(**self._fields()).check(needs)
        except UserError as error:
            return str(error)
        return None

    def _fields(self) -> dict:
        return {name: getattr(self, name) for name in COMMON_FIELDS}
