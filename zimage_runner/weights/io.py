"""Reading and writing stretches of weights files, and the threads that do it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


def read_exactly(descriptor: int, offset: int, memory: memoryview, path: Path) -> None:
    """Fill ``memory`` (bytes) from ``offset`` of an open file; the GIL is free while the kernel copies.

    ``path`` is for the message alone. Raises OSError where the file ends early.
    """
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            # Where it ends, not where this read began: another thread's stretch may hold the end.
            raise OSError(f"{path} ended at byte {os.fstat(descriptor).st_size} while it was read")
        done += count


def write_exactly(descriptor: int, offset: int, memory: memoryview) -> None:
    """Write all of ``memory`` (bytes) at ``offset`` of an open file."""
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)


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


def run_threads(threads: Sequence[threading.Thread], errors: list[BaseException]) -> None:
    """Start them and wait for their end. They watch ``errors``: what interrupts the waiting (Ctrl-C) is put there too.

    They are waited for in that case as well: a thread in torch's C++ when the interpreter goes aborts the process.
    """
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join()
