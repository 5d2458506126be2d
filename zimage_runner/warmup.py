"""What is run once before the first item: the ``warmup`` config group."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError

if TYPE_CHECKING:
    from zimage_runner.engines.base import Engine
    from zimage_runner.sampling import SamplingParams

WARMUP_PROMPT = "a quiet lake at dawn, warm-up picture that is never saved"


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupPass:
    """One timed pass: what it was and how long it took, device synchronised."""

    label: str
    seconds: float


@dataclass(kw_only=True, slots=True)
class Warmup(abc.ABC):
    """An option of the ``warmup`` group."""

    @abc.abstractmethod
    def run(self, engine: Engine, shapes: Sequence[SamplingParams]) -> list[WarmupPass]:
        """Warm the engine for every shape that the plan contains; return the seconds of each pass."""


@dataclass(kw_only=True, slots=True)
class NoWarmup(Warmup):
    """Start with the first item at once: the fastest way to the first picture."""

    def run(self, engine: Engine, shapes: Sequence[SamplingParams]) -> list[WarmupPass]:
        return []


@dataclass(kw_only=True, slots=True)
class Generate(Warmup):
    """Real generations at every shape of the plan, through the same calls as the work."""

    passes: int = 1
    """Generations per shape."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise UserError(f"warmup.passes={self.passes} is below 1: use 1 or more, or warmup=none")

    def run(self, engine: Engine, shapes: Sequence[SamplingParams]) -> list[WarmupPass]:
        return [
            timed_pass(engine, params, f"{params.width}x{params.height} #{n + 1}")
            for params in shapes
            for n in range(self.passes)
        ]


def timed_pass(engine: Engine, params: SamplingParams, label: str) -> WarmupPass:
    """One whole generation (encode, denoise, decode) of the warm-up prompt."""
    from zimage_runner.engines.generate import generate_one

    started = time.perf_counter()
    generate_one(engine, WARMUP_PROMPT, params, seed=0).wait()
    engine.synchronize()
    return WarmupPass(label=label, seconds=time.perf_counter() - started)
