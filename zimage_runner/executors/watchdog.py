"""Sees that a picture of this process takes longer than it may, for ``executor=inline``.

Neither a thread nor a call of a library can be ended from outside. So whoever is told can only write down what is known
and end the process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import GeneratedBatch, PendingImages, ReadyImages

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.executors.base import SessionLike
    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

OFTEN = 20
"""Looks within the time that one picture may take."""
SELDOM_S = 1.0
"""Longest pause between two looks."""

OnOverdue = Callable[[Sequence["WorkItem"], str], None]
"""Hears of the items that were drawn for too long, and why that is too long."""


@dataclass(slots=True)
class _Batch:
    """Items that are being drawn, or whose pictures are waited for."""

    items: Sequence[WorkItem]
    on_overdue: OnOverdue
    since: float


class Watchdog:
    """Times the batches of one session, from a thread of its own that begins with the first.

    While the process stands still (a suspended machine, SIGSTOP) no time passes for it.
    """

    def __init__(self, limit_s: float) -> None:
        """``limit_s``: seconds for a picture; a batch has that for each of its pictures."""
        self._limit_s = limit_s
        self._pause_s = min(SELDOM_S, limit_s / OFTEN)
        self._now = 0.0
        self._numbers = itertools.count()
        self._batches: dict[int, _Batch] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def number(self) -> int:
        """A name for the next batch; earlier ones are smaller."""
        self._start()
        return next(self._numbers)

    @contextlib.contextmanager
    def watching(self, number: int, items: Sequence[WorkItem], on_overdue: OnOverdue) -> Iterator[None]:
        """Time a step of the batch ``number`` while the block runs."""
        with self._lock:
            self._batches[number] = _Batch(items, on_overdue, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._batches.pop(number, None)

    def close(self) -> None:
        """End the thread, and wait for it. Harmless when called twice."""
        self._ended.set()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(SELDOM_S)

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            log.warning("executor.item_timeout_s is not kept: no thread could be started for it (%s)", error)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._pause_s):
            now = time.monotonic()
            self._now, before = self._now + min(now - before, 2 * self._pause_s), now
            with self._lock:
                overdue = any(self._now - b.since > self._limit_s * len(b.items) for b in self._batches.values())
                # A device works in order: what is waited for longest is what all the others wait for too.
                batch = self._batches[min(self._batches)] if overdue else None
            if batch is not None:
                batch.on_overdue(batch.items, self._reason(len(batch.items)))
                return

    def _reason(self, count: int) -> str:
        if count == 1:
            return f"took longer than executor.item_timeout_s={self._limit_s:g}"
        return f"a batch of {count} took longer than {count} x executor.item_timeout_s={self._limit_s:g}"


class WatchedSession:
    """A session whose drawing is timed; all else is the session's own."""

    def __init__(self, session: SessionLike, watchdog: Watchdog) -> None:
        self._session = session
        self._watchdog = watchdog
        self.on_overdue: OnOverdue | None = None
        """Who hears of it; nothing is timed while nobody does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def generate(self, items: Sequence[WorkItem], **options: Any) -> GeneratedBatch:
        """As the session's, and the wait for its pictures is timed as well."""
        if self.on_overdue is None:
            return self._session.generate(items, **options)
        number = self._watchdog.number()
        with self._watchdog.watching(number, items, self.on_overdue):
            done = self._session.generate(items, **options)
        if isinstance(done.images, ReadyImages):
            return done
        return replace(done, images=_WatchedImages(done.images, self._watchdog, number, items, self.on_overdue))


class _WatchedImages(PendingImages):
    def __init__(
        self,
        images: PendingImages,
        watchdog: Watchdog,
        number: int,
        items: Sequence[WorkItem],
        on_overdue: OnOverdue,
    ) -> None:
        self._images = images
        self._watching = watchdog.watching(number, items, on_overdue)

    def wait(self) -> np.ndarray:
        with self._watching:
            return self._images.wait()
