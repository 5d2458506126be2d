"""A run's turns at the model: what the run has for its executor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from zimage_runner.engines.base import PendingImages
from zimage_runner.errors import RunStopped
from zimage_runner.executors.base import Batch, BatchResult, Executor

if TYPE_CHECKING:
    import numpy as np


class Drawing(Protocol):
    """What a run needs of the scheduler."""

    def add_run_batch(self, batch: Batch, turns: Turns) -> None:
        """Queue a batch. Raises RunStopped."""
        ...

    def drop_run_batches(self, turns: Turns) -> None:
        """Forget what is queued."""
        ...

    def report(self) -> dict[str, Any]:
        """Return the session's report."""
        ...


class WaitedOnce(PendingImages):
    """Pictures of several requests: each waits, and the device is asked once."""

    def __init__(self, images: PendingImages) -> None:
        self._images: PendingImages | None = images
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None
        self._error: Exception | None = None

    def wait(self) -> np.ndarray:
        with self._lock:
            if self._images is not None:
                try:
                    self._pixels = self._images.wait()
                except Exception as error:
                    self._error = error
                self._images = None
        if self._error is not None:
            raise self._error
        assert self._pixels is not None
        return self._pixels


class Turns(Executor):
    """What a run has for its executor: its batches are drawn by the scheduler's thread, between requests."""

    def __init__(self, scheduler: Drawing) -> None:
        self._scheduler = scheduler
        self.results: queue.SimpleQueue[BatchResult | RunStopped] = queue.SimpleQueue()

    def start(self) -> dict[str, Any]:
        return self.report()

    def extend(self, shapes: Sequence[Any], texts: Sequence[tuple[str, int]]) -> bool:
        return True  # shapes that are not warm yet get so by being drawn

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        """Keep one batch waiting while another is drawn."""
        source, missing, last = iter(batches), 0, 1
        try:
            while True:
                while missing <= last and (batch := next(source, None)) is not None:
                    last = len(batch.items)
                    missing += last
                    self._scheduler.add_run_batch(batch, self)
                if not missing:
                    return
                result = self.results.get()
                if isinstance(result, RunStopped):
                    raise result
                missing -= len(result.items)
                yield result
        finally:
            self._scheduler.drop_run_batches(self)

    def report(self) -> dict[str, Any]:
        """The session's, which was warm before the run began."""
        report = {name: value for name, value in self._scheduler.report().items() if name != "warmup_passes"}
        return report | {"phases": {"load": 0.0, "warm_up": 0.0}}

    def close(self) -> None:
        self._scheduler.drop_run_batches(self)
