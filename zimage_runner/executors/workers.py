"""What executors with worker processes of their own share: how long a worker may take, and when it is replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zimage_runner.errors import check_range
from zimage_runner.executors.base import ExecutorConfig
from zimage_runner.memory.policies import Action

if TYPE_CHECKING:
    from zimage_runner.session import SessionConfig


@dataclass(kw_only=True, slots=True)
class WorkersConfig(ExecutorConfig):
    """An executor whose workers are replaced when they die, hang or grow."""

    item_timeout_s: float = 1800.0
    """Seconds one picture may take before its worker counts as hung; a batch may take this for each of its items."""
    start_timeout_s: float = 3600.0
    """Seconds that a worker may take to load and warm up; of executor=ray also that the first may wait for a place."""
    max_restarts: int = 5
    """Workers that may die without a single picture in between, for each worker, before the run stops (resumable)."""
    backoff_s: float = 1.0
    """Pause before the second restart in a row; doubled each time, up to a minute."""
    max_items_per_worker: int | None = None
    """Replace a worker after so many items, as a cure for slow leaks; null never does."""

    def __post_init__(self) -> None:
        for name in ("item_timeout_s", "start_timeout_s"):
            check_range(f"executor.{name}", getattr(self, name), 1e-3, 1e9)
        check_range("executor.max_restarts", self.max_restarts, 0, 1000)
        check_range("executor.backoff_s", self.backoff_s, 0, 3600)
        if self.max_items_per_worker is not None:
            check_range("executor.max_items_per_worker", self.max_items_per_worker, 1, 10**9)

    def adapt(self, session: SessionConfig) -> SessionConfig:
        """A large worker is replaced as a whole; its session need not rebuild itself as well."""
        health = replace(session.memory.health, action=Action.warn)
        return replace(session, memory=replace(session.memory, health=health))
