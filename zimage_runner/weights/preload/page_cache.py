"""Before and during ``import torch``: bring the weights into the page cache and create the CUDA context. No torch here.

Both take seconds that the interpreter would otherwise spend one after the other. Threads do the work; the system calls
release the interpreter's lock, so imports go on meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.preload.pinned_buffers import pinned_ahead

log = logging.getLogger(__name__)

PIECE = 16 * 1024 * 1024
THREADS = 8
"""Reads in flight: one reader does not keep an NVMe disk busy."""


class PageCacheReader:
    """Reads files in the background so that a later read finds them in memory; parts already there are skipped.

    Files are read in the order given. ``wait`` returns once all are read; nobody has to call it.
    """

    def __init__(self, paths: Sequence[Path], threads: int = THREADS) -> None:
        self.bytes_read = 0
        """Bytes that had to come from the disk."""
        self.bytes_cached = 0
        """Bytes that were in memory already."""
        self._pieces: SimpleQueue[tuple[Path, int, int]] = SimpleQueue()
        self._lock = threading.Lock()
        for piece in _pieces(paths):
            self._pieces.put(piece)
        self._threads = [threading.Thread(target=self._work, daemon=True, name="page-cache") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        buffer = bytearray(PIECE)
        with contextlib.ExitStack() as files:
            handles: dict[Path, int] = {}
            while True:
                try:
                    path, offset, size = self._pieces.get_nowait()
                except Empty:
                    break
                try:
                    if path not in handles:
                        handles[path] = files.enter_context(path.open("rb", buffering=0)).fileno()
                    cached = _is_cached(handles[path], offset, size)
                    if not cached:
                        os.preadv(handles[path], [memoryview(buffer)[:size]], offset)
                except OSError as error:  # only a head start: whoever loads the file reports what is wrong with it
                    log.debug("cannot read %s ahead: %s", path, error)
                    break
                with self._lock:
                    self.bytes_cached += size if cached else 0
                    self.bytes_read += 0 if cached else size


def read_ahead(paths: Sequence[Path], threads: int = THREADS) -> PageCacheReader | None:
    """Start reading ``paths`` into the page cache; None where memory is too small for it to help."""
    total = sum(path.stat().st_size for path in paths)
    available = available_memory()
    if available is not None and total > 0.8 * available:
        log.debug("not reading %.1f GB ahead: only %.1f GB of memory available", total / 1e9, available / 1e9)
        return None
    return PageCacheReader(paths, threads)


def available_memory() -> int | None:
    """Bytes of memory that can be used without swapping, page cache included; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _pieces(paths: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    for path in paths:
        size = path.stat().st_size
        for offset in range(0, size, PIECE):
            yield path, offset, min(PIECE, size - offset)


def _is_cached(handle: int, offset: int, size: int) -> bool:
    """Whether first and last page of a piece are in memory (a read that must not wait for the disk tells)."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return False
    page = bytearray(1)
    try:
        return all(os.preadv(handle, [page], place, nowait) == 1 for place in (offset, offset + size - 1))
    except BlockingIOError:
        return False
    except OSError:  # a file system without RWF_NOWAIT
        return False


class CudaContext:
    """Creates the primary context of one CUDA device in the background: the one that torch then uses.

    Where there is no NVIDIA driver nothing happens. ``wait`` gives the seconds it took, or None with ``error`` set.
    """

    def __init__(self, device: int = 0, pin: bool = False) -> None:
        """``pin``: also page-lock the memory that a Preload reads into."""
        self._pin = pin
        self.error: str | None = None
        self._seconds: float | None = None
        self._driver: CudaDriver | None = None
        self._thread = threading.Thread(target=self._create, args=(device,), daemon=True, name="cuda-context")
        self._thread.start()

    def wait(self) -> float | None:
        self._thread.join()
        return self._seconds

    def release(self) -> None:
        """Wait for it and give it back, where it was created in vain."""
        self._thread.join()
        driver, self._driver = self._driver, None
        if driver is not None:
            pinned_ahead.close()
            with contextlib.suppress(CudaUnavailable):
                driver.release()

    def _create(self, device: int) -> None:
        began = time.perf_counter()
        try:
            self._driver = CudaDriver(device)
        except CudaUnavailable as error:
            self.error = str(error)
            return
        self._seconds = time.perf_counter() - began
        if self._pin:
            with contextlib.suppress(CudaUnavailable):  # a limit on locked memory: the preload will say so
                pinned_ahead.fill(self._driver)
