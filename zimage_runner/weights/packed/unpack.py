"""Packed weights to tensors where the preloader did not bring them: on the CPU, and on a GPU after torch is there.

A GPU unpacks with the kernel that preloading uses, or, where that one does not run, with torch's own operations.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from zimage_runner.weights.io import read_exactly, run_threads
from zimage_runner.weights.load import tensor_views
from zimage_runner.weights.packed.format import BLOCK, Frame, Packing
from zimage_runner.weights.packed.kernel import UnpackKernel
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.safetensors_file import BadWeightsFile

log = logging.getLogger(__name__)

BLOCKS = 256
"""Unpacked at a time by torch's operations, whose intermediate results take some ten times as much memory."""


class Unpacker(Protocol):
    """Turns a frame's bytes on a device into its weights there."""

    def __call__(self, data: torch.Tensor, frame: Frame, out: torch.Tensor) -> None:
        """``data``: uint8 [frame.nbytes]; ``out``: uint8 [2 * frame.values], written on the current stream."""
        ...


@torch.inference_mode(False)  # threads fill the memory, and they are not in the caller's inference mode
def load_packed(packings: Sequence[Packing], device: str, threads: int) -> dict[str, torch.Tensor]:
    """All tensors of packed files on a device; complete when this returns. Raises OSError or BadWeightsFile."""
    buffers = [torch.empty(packing.unpacked.size, dtype=torch.uint8, device=device) for packing in packings]
    work: SimpleQueue[tuple[Packing, Frame, torch.Tensor]] = SimpleQueue()
    for packing, buffer in zip(packings, buffers, strict=True):
        for frame in packing.frames:
            work.put((packing, frame, buffer[frame.start : frame.start + 2 * frame.values]))
    reader = _Reader(work, device, max((packing.largest_frame for packing in packings), default=0))
    reader.run(threads)
    return {
        name: view
        for packing, buffer in zip(packings, buffers, strict=True)
        for name, view in tensor_views(packing.unpacked, buffer)
    }


def read_frame(packing: Packing, frame: Frame) -> torch.Tensor:
    """A frame's weights on the CPU, uint8 [2 * frame.values]. Raises OSError or BadWeightsFile."""
    data, out = (torch.empty(nbytes, dtype=torch.uint8) for nbytes in (frame.nbytes, 2 * frame.values))
    _read(packing, frame, data)
    if frame.counts is None:
        return data
    unpack_frame(data, frame, out)
    return out


def _read(packing: Packing, frame: Frame, data: torch.Tensor) -> None:
    path = packing.unpacked.path
    with path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), frame.offset, data.numpy().data, path)


class _Reader:
    """Threads that each read a frame, bring it to the device and unpack it there."""

    def __init__(self, work: SimpleQueue[tuple[Packing, Frame, torch.Tensor]], device: str, largest: int) -> None:
        self._work, self._device, self._largest = work, torch.device(device), largest
        self._errors: list[BaseException] = []
        self._on_gpu = is_cuda(self._device)
        self._unpack = unpacker(self._device) if self._on_gpu else unpack_frame

    def run(self, threads: int) -> None:
        ready = None
        # The caller's to allocate: what other streams allocate stays theirs, unused, until the cache is emptied.
        staging = [torch.empty(self._largest, dtype=torch.uint8, device=self._device) for _ in range(threads)]
        if self._on_gpu:  # the buffers' memory may have been in use on the caller's stream until just now
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        workers = [threading.Thread(target=self._try, args=(ready, own), name="unpack-weights") for own in staging]
        run_threads(workers, self._errors)
        if self._errors:
            raise self._errors[0]

    def _try(self, ready: Any, staging: torch.Tensor) -> None:
        try:
            if not self._on_gpu:
                self._work_off(None, staging, staging)
                return
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                host = torch.empty(self._largest, dtype=torch.uint8, pin_memory=True)
                try:
                    self._work_off(stream, host, staging)
                finally:
                    stream.synchronize()  # after an error too: the staging memory becomes the caller's again
        except BaseException as error:  # raised again in the caller's thread
            self._errors.append(error)

    def _work_off(self, stream: Any, host: torch.Tensor, staging: torch.Tensor) -> None:
        """Frame after frame, through the thread's own memory: ``staging`` is on the device."""
        while not self._errors:
            try:
                packing, frame, out = self._work.get_nowait()
            except Empty:
                return
            data = host[: frame.nbytes]
            _read(packing, frame, data)
            if self._on_gpu:
                data = staging[: frame.nbytes].copy_(data, non_blocking=True)
            if frame.counts is None:
                out.copy_(data)
            else:
                self._unpack(data, frame, out)
            if stream is not None:
                stream.synchronize()


def is_cuda(device: torch.device) -> bool:
    """Whether the device has streams, and memory of its own."""
    return device.type == "cuda"


def unpacker(device: torch.device) -> Unpacker:
    """The fastest way that a CUDA device has."""
    return _unpacker_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # machine code that was loaded stays loaded, and with memory=staged weights come again and again
def _unpacker_of(index: int) -> Unpacker:
    try:
        driver = CudaDriver(index)
        driver.enter()
        return functools.partial(_launch, driver, UnpackKernel(driver))
    except (CudaUnavailable, OSError) as error:
        log.info("packed weights are unpacked by torch's operations, which is slower: %s", error)
        return unpack_frame


def _launch(driver: CudaDriver, kernel: UnpackKernel, data: torch.Tensor, frame: Frame, out: torch.Tensor) -> None:
    driver.enter()
    kernel.launch(data.data_ptr(), out.data_ptr(), frame, torch.cuda.current_stream(data.device).cuda_stream)


def unpack_frame(data: torch.Tensor, frame: Frame, out: torch.Tensor) -> None:
    """An Unpacker of torch's operations alone. Raises BadWeightsFile for a frame that contradicts its counts."""
    assert frame.counts is not None
    blocks = -(-frame.values // BLOCK)
    codes = [frame.values, *frame.counts[:2]]
    sizes = [16 * blocks, frame.values, *[-(-count // 4) for count in codes], frame.counts[2]]
    table, mantissas, level1, level2, level3, far = data.split(sizes)
    tops = table.view(blocks, 16)[:, 0]
    # What follows a code that is told further on, in the order in which it is read, and how far it is read.
    followers = [
        _Follower(4, frame.counts[0], lambda begin, end: _distances_of_level_2(_codes(level2, begin, end))),
        _Follower(6, frame.counts[1], lambda begin, end: _codes(level3, begin, end) + 6),
        _Follower(9, frame.counts[2], lambda begin, end: far[begin:end]),
    ]
    values = out.view(torch.int16)
    for begin in range(0, frame.values, BLOCKS * BLOCK):
        end = min(begin + BLOCKS * BLOCK, frame.values)
        distances = _codes(level1, begin, end) + 1
        for follower in followers:
            follower.fill(distances)
        own_tops = tops[begin // BLOCK : -(-end // BLOCK)].repeat_interleave(BLOCK)[: end - begin]
        exponents, mantissa = (own_tops - distances).to(torch.int16), mantissas[begin:end].to(torch.int16)
        values[begin:end] = (mantissa & 0x80) << 8 | exponents << 7 | mantissa & 0x7F
    if any(follower.begin != follower.count for follower in followers):
        raise BadWeightsFile(f"a frame does not hold the codes that its counts {frame.counts} promise")


class _Follower:
    """A section that tells what the one before left open."""

    def __init__(self, marker: int, count: int, read: Callable[[int, int], torch.Tensor]) -> None:
        self.marker, self.count, self.read = marker, count, read
        self.begin = 0

    def fill(self, distances: torch.Tensor) -> None:
        """Put the section's next distances where ``marker`` stands, which no code before says."""
        left_open = distances == self.marker
        end = self.begin + int(left_open.sum())
        if end > self.count:
            raise BadWeightsFile(f"a frame leaves more than {self.count} codes open")
        distances[left_open] = self.read(self.begin, end)
        self.begin = end


def _distances_of_level_2(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(codes == 0, codes, codes + 3)


def _codes(level: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Codes ``begin`` to ``end`` of a level, uint8."""
    stretch = level[begin // 4 : -(-end // 4)]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=level.device)
    codes = stretch[:, None] >> shifts & 3
    return codes.reshape(-1)[begin % 4 : begin % 4 + end - begin]
