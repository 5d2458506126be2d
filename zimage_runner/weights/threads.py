"""Threads that let go at once when they are interrupted, which ``ThreadPoolExecutor`` alone does not."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import TracebackType


class Threads(ThreadPoolExecutor):
    """Left by an exception (Ctrl-C), it drops what has not begun; what has begun ends at its next ``check``."""

    def __init__(self, count: int) -> None:
        super().__init__(max_workers=count)
        self._abandoned = threading.Event()

    def check(self) -> None:
        """For tasks that take long: raises CancelledError once the pool is abandoned."""
        if self._abandoned.is_set():
            raise CancelledError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandoned.set()
        self.shutdown(wait=True, cancel_futures=kind is not None)
