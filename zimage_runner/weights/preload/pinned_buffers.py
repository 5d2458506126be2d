"""A thread's way from files to the GPU: page-locked buffers, one of which is read into while another is on the bus."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from zimage_runner.weights.io import read_exactly
from zimage_runner.weights.packed.format import Frame
from zimage_runner.weights.packed.kernel import UnpackKernel
from zimage_runner.weights.preload.cuda_driver import CudaDriver

THREADS = 8
BUFFERS = 2
"""Buffers of each thread."""
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
        for _ in range(BUFFERS * THREADS):
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is read at once."""

    offset: int
    """In the file."""
    nbytes: int
    start: int
    """Where it goes in the device's buffer."""
    packed: Frame | None = None
    """None: it goes there as it is."""


Ticket = TypeVar("Ticket")


class PinnedBuffers(Generic[Ticket]):
    """A stream and the buffers that feed it, all given back at the end of ``with``.

    Whoever sends a chunk gives a ticket, and gets it back when the chunk has arrived.
    """

    def __init__(self, driver: CudaDriver, kernel: UnpackKernel | None) -> None:
        """``kernel``: needed for packed chunks."""
        self._driver = driver
        self._kernel = kernel
        with ExitStack() as made:
            self._stream = driver.stream()
            made.callback(driver.destroy_stream, self._stream)
            self._staging = 0
            """Device memory that packed chunks are unpacked from. One serves all buffers: a stream's work is done in
            order, so that the next copy waits for the kernel that reads the last one."""
            if kernel is not None:
                self._staging = driver.allocate(CHUNK_BYTES)
                made.callback(driver.free, self._staging, CHUNK_BYTES)
            self._buffers, self._events = [], []
            for _ in range(BUFFERS):
                self._buffers.append(pinned_ahead.take() or driver.allocate_pinned(CHUNK_BYTES))
                made.callback(driver.free_pinned, self._buffers[-1])
                self._events.append(driver.event())
                made.callback(driver.destroy_event, self._events[-1])
            self._held = made.pop_all()
        self._flying: list[Ticket | None] = [None] * BUFFERS
        self._turn = 0
        self._file: tuple[Path, int] | None = None

    def __enter__(self) -> PinnedBuffers[Ticket]:
        return self

    def send(self, ticket: Ticket, path: Path, chunk: Chunk, base: int) -> Ticket | None:
        """Read a chunk and start its way into the device's buffer at ``base``.

        Returns the ticket of what was in that buffer before and has arrived.
        """
        number = self._turn
        self._turn = (number + 1) % BUFFERS
        arrived = self._wait(number)
        host = self._buffers[number]
        memory = memoryview((ctypes.c_ubyte * chunk.nbytes).from_address(host)).cast("B")
        read_exactly(self._descriptor(path), chunk.offset, memory, path)
        if chunk.packed is None:
            self._driver.copy_to_device(base + chunk.start, host, chunk.nbytes, self._stream)
        else:
            self._unpack(host, chunk.packed, base + chunk.start)
        self._driver.record(self._events[number], self._stream)
        self._flying[number] = ticket
        return arrived

    def _unpack(self, host: int, frame: Frame, target: int) -> None:
        """Start the copy of a packed chunk and what unpacks it behind the copy."""
        assert self._kernel is not None
        self._driver.copy_to_device(self._staging, host, frame.nbytes, self._stream)
        self._kernel.launch(self._staging, target, frame, self._stream)

    def drain(self) -> Iterator[Ticket]:
        """Wait for what is still on the bus."""
        for step in range(BUFFERS):
            ticket = self._wait((self._turn + step) % BUFFERS)
            if ticket is not None:
                yield ticket

    def _wait(self, number: int) -> Ticket | None:
        ticket, self._flying[number] = self._flying[number], None
        if ticket is not None:
            self._driver.wait(self._events[number])
        return ticket

    def _descriptor(self, path: Path) -> int:
        if self._file is None or self._file[0] != path:
            self._close_file()
            self._file = (path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._file[1]

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def __exit__(self, *_: object) -> None:
        self._close_file()
        with self._held:
            # After an error a copy may be under way that no event tells of: it uses the buffers until it is over.
            self._driver.finish(self._stream)
