"""A session without a model that draws when a test lets it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tests.support.faulty_session import FaultySession
from zimage_runner.engines.base import GeneratedBatch
from zimage_runner.plan import WorkItem


class GatedSession(FaultySession):
    """Draws a batch each time the gate lets it, and notes what was drawn. All sessions of a process share both."""

    gate: threading.Semaphore | None = None
    """None: always open."""
    waits = threading.Event()
    """Set once a batch is at the gate."""
    batches: list[list[tuple[str, int]]] = []  # noqa: RUF012

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        self.batches.append([(item.prompt.text, item.seed) for item in items])
        if self.gate is not None:
            self.waits.set()
            assert self.gate.acquire(timeout=60)
        return super().generate(items, attempt=attempt, tiled=tiled)
