"""``memory=auto``: which placement is taken, given how much each needs and how much is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zimage_runner import GB
from zimage_runner.memory.policies import Auto, Memory

FRAGMENTS, KERNELS = 0.03, 0.5e9
"""Of the free memory: the share that fragments take, and bytes for machine code that is loaded on first use."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the weights are, and why there, where there was a choice."""

    memory: Memory
    why: str = ""
    """What the next better placement would need; empty where there is none better, or the placement was given."""
    fits: bool = True


def chosen(memory: Memory, peaks: Mapping[type[Memory], int], free: int) -> Placed:
    """The first placement of ``peaks`` (bytes at most, the fastest first) that fits into ``free`` bytes.

    If none does, the one that needs least. A ``memory`` other than auto is itself.
    """
    if not isinstance(memory, Auto):
        return Placed(memory)
    room = free * (1 - FRAGMENTS) - KERNELS
    kinds = list(peaks)
    kind = next((kind for kind in kinds if peaks[kind] <= room), min(kinds, key=lambda kind: peaks[kind]))
    better = kinds[: kinds.index(kind)]
    needed = [f"{one.placement} would need {_needed(peaks[one]):.1f} GB" for one in better[-1:]]
    fits = peaks[kind] <= room
    if not fits:
        needed.insert(0, f"{kind.placement} itself needs {_needed(peaks[kind]):.1f} GB, the least")
    why = f"{free / GB:.1f} GB of the GPU's memory are free; {', '.join(needed)}" if needed else ""
    return Placed(memory.taken(kind), why, fits)


def _needed(peak: int) -> float:
    """GB that have to be free."""
    return (peak + KERNELS) / (1 - FRAGMENTS) / GB
