"""``kernel(name)[grid](...)``: the prebuilt kernel where there is one for these arguments, else Triton's."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zimage_runner.engines.native.kernels import prebuilt

log = logging.getLogger(__name__)

DEFINITIONS = tuple(f"zimage_runner.engines.native.kernels.{name}" for name in ("definitions", "quantised_definitions"))


class Kernel:
    """A kernel of ``definitions.py``, called as Triton's own are: ``kernel[grid](*args, num_warps=4, BLOCK=1024)``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        if args[0].is_cuda:
            device = args[0].get_device()
            ready = prebuilt.for_device(device)
            # What torch.cuda.current_stream() asks, without the object around the answer.
            stream = torch._C._cuda_getCurrentRawStream(device)
            if ready is not None and ready.launch(self.name, grid, args, constants, num_warps, stream):
                return
            _tell(prebuilt.specialization(self.name, args, constants, num_warps) or self.name)
        definition(self.name)[grid](*args, num_warps=num_warps, **constants)


def definition(name: str) -> Any:
    """The kernel as Triton knows it. Imports Triton."""
    for module in DEFINITIONS:
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    raise AttributeError(f"no kernel {name}")


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel of that name."""
    return Kernel(name)


@functools.cache
def _tell(key: str) -> None:
    log.info("compiled here, not prebuilt: kernel %s", key)
