"""Weights on their way to the GPU while torch is still being imported.

Importing torch takes seconds in which disk, bus and GPU would idle. Threads read a prepared checkpoint's files in
large pieces into small page-locked buffers and copy them to the device; when torch is there it takes the memory
over without another copy (``__cuda_array_interface__``). Packed files arrive frame by frame in a small buffer of their
own on the device, from which a kernel unpacks them to where they belong.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.weights.packed.format import Packing
from zimage_runner.weights.packed.kernel import UnpackKernel
from zimage_runner.weights.preload import pinned_buffers
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.preload.gil import switch_as_usual, switch_quickly
from zimage_runner.weights.preload.pinned_buffers import Chunk, PinnedBuffers

log = logging.getLogger(__name__)


class DeviceBuffer:
    """A file's bytes on the GPU. Frees them when the last tensor made from it is gone."""

    def __init__(self, driver: CudaDriver, nbytes: int) -> None:
        self._driver = driver
        self.nbytes = nbytes
        self.address = 0
        self._taken = max(1, nbytes)  # the driver refuses to allocate nothing
        self.address = driver.allocate(self._taken)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Lets torch wrap the memory: ``torch.as_tensor(buffer, device="cuda")`` is uint8 [nbytes]."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        if self.address == 0:  # there was no room for it
            return
        # Whatever thread lets go of the last tensor, its own device stays current.
        with contextlib.suppress(CudaUnavailable), self._driver.entered():
            self._driver.free(self.address, self._taken)


@dataclass(slots=True, eq=False)
class _Load:
    """One file on its way."""

    path: Path
    nbytes: int
    """On the device."""
    chunks: list[Chunk]
    buffer: DeviceBuffer | None = None
    remaining: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_packed(self) -> bool:
        return any(chunk.packed is not None for chunk in self.chunks)


class Preload:
    """Copies byte ranges of files to the GPU in the background.

    Files arrive in the order given. ``take`` waits for one of them. After any failure, that there is no GPU among
    them, ``take`` raises it, and the caller loads that file in another way.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[Path, int, int]],
        *,
        packings: Mapping[Path, Packing] | None = None,
        driver: CudaDriver | None = None,
        fits: Callable[[int], bool] | None = None,
    ) -> None:
        """``ranges``: (path, first byte, number of bytes) of each file; of packed files, which ``packings`` has, all
        frames are read. Returns at once. ``fits`` is asked with the device's free bytes before anything is sent; if it
        says no, nothing is."""
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self.seconds: dict[Path, float] = {}
        """Time from the start until each file was on the device."""
        packings = packings or {}
        self._all = [
            _packed(path, packings[path]) if path in packings else _plain(path, start, size)
            for path, start, size in ranges
        ]
        self._loads = {load.path: load for load in self._all}
        """Those that were not taken yet."""
        self._chunks: queue.SimpleQueue[tuple[_Load, Chunk] | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._closed = False
        self._fits = fits
        self._free: int | None = None
        self.does_not_fit = False
        """What ``fits`` said, once ``free_bytes`` has returned."""
        self._looked = threading.Event()
        switch_quickly()
        self._opener = threading.Thread(target=self._open, args=(driver,), name="preload", daemon=True)
        self._opener.start()

    def _open(self, driver: CudaDriver | None) -> None:
        """Creating the CUDA context and taking memory need a third of a second of their own."""
        try:
            driver = driver or CudaDriver()
            driver.enter()
            self._tell("CUDA context")
            if self._fits is not None:
                self._free = driver.free_bytes()
                self.does_not_fit = not self._fits(self._free)
                self._looked.set()
            if self.does_not_fit:
                return
            kernel = UnpackKernel(driver) if any(load.is_packed for load in self._all) else None
            for load in self._all:
                self._queue(load, DeviceBuffer(driver, load.nbytes))
            self._tell("memory on the device")
            for _ in range(pinned_buffers.THREADS):
                self._chunks.put(None)
                reader = threading.Thread(target=self._read, args=(driver, kernel), name="preload", daemon=True)
                reader.start()
                self._readers.append(reader)
        except BaseException as error:
            self._fail(error)
        finally:
            self._looked.set()

    def free_bytes(self) -> int | None:
        """Of the device before anything was sent, waiting for the reading; None where nobody asked, or no device."""
        self._looked.wait()
        return self._free

    def _queue(self, load: _Load, buffer: DeviceBuffer) -> None:
        load.buffer = buffer
        load.remaining = len(load.chunks)
        for chunk in load.chunks:
            self._chunks.put((load, chunk))
        if not load.chunks:
            load.done.set()

    def __contains__(self, path: Path) -> bool:
        """Whether the file can be taken: it was asked for and was not taken before."""
        return path in self._loads

    def take(self, path: Path) -> DeviceBuffer:
        """The file's bytes on the device, waiting for them. Each file can be taken once."""
        load = self._loads.pop(path)
        load.done.wait()
        if self._error is not None:
            raise self._error
        buffer, load.buffer = load.buffer, None  # the caller's alone: it is freed with the last tensor made from it
        assert buffer is not None
        if not self._loads:
            self.close()
        return buffer

    def close(self) -> None:
        """Wait for the threads and give up what was not taken. Harmless when called twice."""
        self._opener.join()
        for reader in self._readers:
            reader.join()
        for load in self._all:
            load.buffer = None  # the error's traceback, for one, still knows the load
        self._loads.clear()
        self._all.clear()
        pinned_buffers.pinned_ahead.close()
        if not self._closed:
            self._closed = True
            switch_as_usual()

    def _read(self, driver: CudaDriver, kernel: UnpackKernel | None) -> None:
        try:
            driver.enter()
            with PinnedBuffers[_Load](driver, kernel) as own:
                while (work := self._chunks.get()) is not None and self._error is None:
                    load, chunk = work
                    assert load.buffer is not None
                    self._finished(own.send(load, load.path, chunk, load.buffer.address))
                for load in own.drain():
                    self._finished(load)
        except BaseException as error:
            self._fail(error)

    def _finished(self, load: _Load | None) -> None:
        if load is None:
            return
        with self._lock:
            load.remaining -= 1
            if load.remaining == 0:
                self.seconds[load.path] = self._tell(f"{load.path.name}: {load.nbytes / 1e9:.2f} GB")
                load.done.set()

    def _tell(self, what: str) -> float:
        """Log that it is there; the seconds it took from the start."""
        seconds = time.perf_counter() - self._started
        log.debug("preload: %s after %.3f s", what, seconds)
        return seconds

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        for load in self._all:
            load.done.set()


def _plain(path: Path, offset: int, nbytes: int) -> _Load:
    starts = range(0, nbytes, pinned_buffers.CHUNK_BYTES)
    return _Load(path, nbytes, [Chunk(offset + s, min(pinned_buffers.CHUNK_BYTES, nbytes - s), s) for s in starts])


def _packed(path: Path, packing: Packing) -> _Load:
    assert packing.largest_frame <= pinned_buffers.CHUNK_BYTES, packing.largest_frame
    frames = packing.frames
    chunks = [Chunk(f.offset, f.nbytes, f.start, None if f.counts is None else f) for f in frames]
    return _Load(path, packing.unpacked.size, chunks)
