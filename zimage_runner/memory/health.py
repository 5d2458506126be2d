"""The article's production advice as a function: read the GPU's memory at an interval, and act on a threshold."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from zimage_runner.errors import UserError
from zimage_runner.memory.readings import gpu_memory

log = logging.getLogger(__name__)


class Action(enum.Enum):
    """What happens when the threshold is exceeded."""

    warn = "warn"
    """A line in the log; the run goes on."""
    recycle = "recycle"
    """The session is torn down and rebuilt before the next picture: memory starts afresh, pictures stay the same."""


@dataclass(kw_only=True, slots=True)
class Health:
    """When to read the GPU's memory, and what is too much."""

    interval_seconds: float = 600.0
    """Seconds between readings; the article's ten minutes. 0 reads before every batch."""
    max_reserved_gb: float | None = None
    """Threshold on reserved_bytes.all.current in GB (1e9 bytes), e.g. the article's 32; null never acts."""
    action: Action = Action.warn

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 <= self.interval_seconds <= 1e9:
            raise UserError(f"memory.health.interval_seconds={self.interval_seconds} is out of range: use 0 or more")
        if self.max_reserved_gb is not None and not 0 < self.max_reserved_gb <= 1e6:
            raise UserError(f"memory.health.max_reserved_gb={self.max_reserved_gb} is out of range: use more than 0")
        if self.action is Action.recycle and self.max_reserved_gb is None:
            raise UserError(
                "memory.health.action=recycle needs a threshold: set memory.health.max_reserved_gb, e.g. 32"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """GPU memory at one moment, and whether the session should be rebuilt."""

    memory: dict[str, float]
    """As ``monitor.gpu_memory``: GB allocated and reserved, now and at most."""
    recycle: bool


class HealthCheck:
    """Reads when due. One per session."""

    def __init__(
        self,
        health: Health,
        read: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._read = read
        self._clock = clock
        self._last: float | None = None

    def poll(self) -> Reading | None:
        """A reading if one is due and the process has GPU memory, else None. The first poll always reads."""
        now = self._clock()
        if self._last is not None and now - self._last < self._health.interval_seconds:
            return None
        memory = (self._read or gpu_memory)()
        if not memory:
            return None
        self._last = now
        limit = self._health.max_reserved_gb
        exceeded = limit is not None and memory["reserved_gb"] > limit
        if exceeded:
            log.warning(
                "GPU memory: %.1f GB reserved, above memory.health.max_reserved_gb=%g%s",
                memory["reserved_gb"],
                limit,
                ": rebuilding the session" if self._health.action is Action.recycle else "",
            )
        return Reading(memory=memory, recycle=exceeded and self._health.action is Action.recycle)
