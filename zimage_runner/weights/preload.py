"""Weights on their way to the GPU while torch is still being imported.

Importing torch takes seconds in which disk, bus and GPU would idle. Threads read a prepared checkpoint's files in
large pieces into small page-locked buffers and copy them to the device; when torch is there it takes the memory
over without another copy (``__cuda_array_interface__``). Packed files arrive frame by frame in a small buffer of their
own on the device, from which a kernel unpacks them to where they belong.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.switching import switch_as_usual, switch_quickly
from zimage_runner.weights.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.packed import Frame, Packing
from zimage_runner.weights.read import read_exactly
from zimage_runner.weights.unpacking.kernel import UnpackKernel

log = logging.getLogger(__name__)

THREADS = 8
CHUNK_BYTES = 16 << 20
"""Large, so that a thread seldom needs the GIL, which the import holds for long stretches; but page-locking memory, two
chunks a thread, holds up the import's own mappings. Not less than a frame of packed.py."""


class PinnedAhead:
    """Page-locked chunks made while nobody knows yet which files will be read: locking takes 0.6 s a GiB."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[tuple[CudaDriver, int]] = []
        self._wanted = True

    def fill(self, driver: CudaDriver) -> None:
        """As many as a Preload uses, one by one; ends early once there is no use for more."""
        driver.enter()
        for _ in range(2 * THREADS):
            with self._lock:
                if not self._wanted:
                    return
                self._chunks.append((driver, driver.allocate_pinned(CHUNK_BYTES)))

    def take(self) -> int | None:
        """The address of one, the caller's from now on; None if there is none: whoever reads makes its own by now."""
        with self._lock:
            if self._chunks:
                return self._chunks.pop()[1]
            self._wanted = False
            return None

    def close(self) -> None:
        """Free what was not taken, and make no more."""
        with self._lock:
            self._wanted = False
            while self._chunks:
                driver, address = self._chunks.pop()
                with driver.entered():  # the caller may be a thread of torch's, with a context of its own
                    driver.free_pinned(address)


pinned_ahead = PinnedAhead()
"""This process's. Memory of the primary context, which every CudaDriver of the device shares."""


class DeviceBuffer:
    """A file's bytes on the GPU. Frees them when the last tensor made from it is gone."""

    def __init__(self, driver: CudaDriver, nbytes: int) -> None:
        self._driver = driver
        self.nbytes = nbytes
        self.address = driver.allocate(nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Lets torch wrap the memory: ``torch.as_tensor(buffer, device="cuda")`` is uint8 [nbytes]."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        with contextlib.suppress(CudaUnavailable):
            self._driver.enter()
            self._driver.free(self.address, self.nbytes)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What is read at once."""

    offset: int
    """In the file."""
    nbytes: int
    start: int
    """Where it goes in the device's buffer."""
    packed: Frame | None = None
    """None: it goes there as it is."""


@dataclass(slots=True, eq=False)
class _Load:
    """One file on its way."""

    path: Path
    nbytes: int
    """On the device."""
    chunks: list[_Chunk]
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
    ) -> None:
        """``ranges``: (path, first byte, number of bytes) of each file; of packed files, which ``packings`` has, all
        frames are read. Returns at once."""
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
        self._chunks: queue.SimpleQueue[tuple[_Load, _Chunk] | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._closed = False
        switch_quickly()
        self._opener = threading.Thread(target=self._open, args=(driver,), name="preload", daemon=True)
        self._opener.start()

    def _open(self, driver: CudaDriver | None) -> None:
        """Creating the CUDA context and taking memory need a third of a second of their own."""
        try:
            driver = driver or CudaDriver()
            driver.enter()
            self._tell("CUDA context")
            kernel = UnpackKernel(driver) if any(load.is_packed for load in self._all) else None
            for load in self._all:
                self._queue(load, DeviceBuffer(driver, load.nbytes))
            self._tell("memory on the device")
            self._readers = [
                threading.Thread(target=self._read, args=(driver, kernel), name="preload", daemon=True)
                for _ in range(THREADS)
            ]
            for reader in self._readers:
                self._chunks.put(None)
                reader.start()
        except BaseException as error:
            self._fail(error)

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

    def memory(self) -> DeviceBuffer | None:
        """The largest file's place on the device, once it is allocated, whatever has arrived there; None without one.

        To be read from, not written to. The caller's reference keeps the memory.
        """
        self._opener.join()
        if self._error is not None:  # whoever loads in another way may need that memory
            return None
        buffers = [buffer for load in list(self._all) if (buffer := load.buffer) is not None]
        return max(buffers, key=lambda buffer: buffer.nbytes, default=None)

    def take(self, path: Path) -> DeviceBuffer:
        """The file's bytes on the device, waiting for them. Each file can be taken once."""
        load = self._loads.pop(path)
        load.done.wait()
        if self._error is not None:
            raise self._error
        if not self._loads:
            self.close()
        buffer, load.buffer = load.buffer, None  # the caller's alone: it is freed with the last tensor made from it
        assert buffer is not None
        return buffer

    def close(self) -> None:
        """Wait for the threads and give up what was not taken. Harmless when called twice."""
        self._opener.join()
        for reader in self._readers:
            reader.join()
        self._loads.clear()
        self._all.clear()
        pinned_ahead.close()
        if not self._closed:
            self._closed = True
            switch_as_usual()

    def _read(self, driver: CudaDriver, kernel: UnpackKernel | None) -> None:
        try:
            driver.enter()
            with _Lanes(driver, kernel) as lanes:
                while (chunk := self._chunks.get()) is not None and self._error is None:
                    self._finished(lanes.send(*chunk))
                for load in lanes.drain():
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
    starts = range(0, nbytes, CHUNK_BYTES)
    return _Load(path, nbytes, [_Chunk(offset + s, min(CHUNK_BYTES, nbytes - s), s) for s in starts])


def _packed(path: Path, packing: Packing) -> _Load:
    assert packing.largest_frame <= CHUNK_BYTES, packing.largest_frame
    frames = packing.frames
    chunks = [_Chunk(f.offset, f.nbytes, f.start, None if f.counts is None else f) for f in frames]
    return _Load(path, packing.unpacked.size, chunks)


class _Lanes:
    """A thread's two page-locked buffers: one is read into while the other is on the bus."""

    def __init__(self, driver: CudaDriver, kernel: UnpackKernel | None) -> None:
        """``kernel``: needed for packed chunks."""
        self._driver = driver
        self._kernel = kernel
        self._staging: int | None = None
        """Device memory that packed chunks are unpacked from, a chunk a lane, taken when the first one comes."""
        self._stream = driver.stream()
        self._buffers = [pinned_ahead.take() or driver.allocate_pinned(CHUNK_BYTES) for _ in range(2)]
        self._events = [driver.event() for _ in range(2)]
        self._flying: list[_Load | None] = [None, None]
        self._turn = 0
        self._file: tuple[Path, int] | None = None

    def __enter__(self) -> _Lanes:
        return self

    def send(self, load: _Load, chunk: _Chunk) -> _Load | None:
        """Read a chunk and start its copy; returns the load whose chunk was in that buffer before and has arrived."""
        lane = self._turn
        self._turn = 1 - lane
        arrived = self._wait(lane)
        host = self._buffers[lane]
        memory = memoryview((ctypes.c_ubyte * chunk.nbytes).from_address(host)).cast("B")
        read_exactly(self._descriptor(load.path), chunk.offset, memory, load.path)
        assert load.buffer is not None
        target = load.buffer.address + chunk.start
        if chunk.packed is None:
            self._driver.copy_to_device(target, host, chunk.nbytes, self._stream)
        else:
            self._unpack(lane, chunk.packed, target)
        self._driver.record(self._events[lane], self._stream)
        self._flying[lane] = load
        return arrived

    def _unpack(self, lane: int, frame: Frame, target: int) -> None:
        """Start the copy of a packed chunk and what unpacks it behind the copy."""
        assert self._kernel is not None
        if self._staging is None:
            self._staging = self._driver.allocate(2 * CHUNK_BYTES)
        staging = self._staging + lane * CHUNK_BYTES
        self._driver.copy_to_device(staging, self._buffers[lane], frame.nbytes, self._stream)
        self._kernel.launch(staging, target, frame, self._stream)

    def drain(self) -> Iterator[_Load]:
        """Wait for what is still on the bus."""
        for lane in (self._turn, 1 - self._turn):
            load = self._wait(lane)
            if load is not None:
                yield load

    def _wait(self, lane: int) -> _Load | None:
        load, self._flying[lane] = self._flying[lane], None
        if load is not None:
            self._driver.wait(self._events[lane])
        return load

    def _descriptor(self, path: Path) -> int:
        if self._file is None or self._file[0] != path:
            if self._file is not None:
                os.close(self._file[1])
            self._file = (path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._file[1]

    def __exit__(self, *_: object) -> None:
        for lane in (0, 1):
            self._wait(lane)
            self._driver.destroy_event(self._events[lane])
            self._driver.free_pinned(self._buffers[lane])
        if self._staging is not None:
            self._driver.free(self._staging, 2 * CHUNK_BYTES)
        self._driver.destroy_stream(self._stream)
        if self._file is not None:
            os.close(self._file[1])
