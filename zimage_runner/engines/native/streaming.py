"""``memory=streamed``: the transformer's blocks come to the GPU one after another, each just before it is used.

The large weights of all blocks lie in host memory, a block's side by side. On the device there are places for a few
blocks; while one block computes, the next ones' weights are copied to the others. What is computed is the same, bit for
bit: the same kernels on the same numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zimage_runner.engines.footprint import PLACES
from zimage_runner.engines.native.quantised import QuantisedLinear
from zimage_runner.weights.cache import cache_root
from zimage_runner.weights.preload.page_cache import available_memory

log = logging.getLogger(__name__)

PROJECTIONS = ("before_proj", "after_proj")
"""Products that a ControlNet's blocks have besides."""
ALIGNMENT = 256
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
SPARE_HOST_BYTES = 3 << 30
"""Host memory left to the rest of the machine."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """A large weight: the module that multiplies by it, and where it lies among its block's."""

    owner: nn.Module
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The weight in its block's bytes."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


def large_weights(block: nn.Module, dtype: torch.dtype) -> list[_Weight]:
    """The weights of a block's products; ``dtype`` is that of products that are not in eight bits."""
    weights, place = [], 0
    parts = ["attention.qkv", "attention.out", "feed_forward.w1w3", "feed_forward.w2"]
    parts += [part for part in PROJECTIONS if getattr(block, part, None) is not None]
    for part in parts:
        owner = block.get_submodule(part)
        weight = owner.get_parameter("weight")
        kind = weight.dtype if isinstance(owner, QuantisedLinear) else dtype
        weights.append(_Weight(owner, place, weight.shape, kind))
        place += -(-weights[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return weights


class BlockStream:
    """The large weights of blocks that are used in turn, again and again."""

    def __init__(
        self, blocks: list[nn.Module], device: torch.device, dtype: torch.dtype, passing: bool = False
    ) -> None:
        """Blocks on the meta device: their large weights are to be ``put`` here, in any order.

        ``passing``: the blocks are used only now and then. They share one place on the device, which is free otherwise.
        """
        self._device, self._passing = device, passing
        self._weights = [large_weights(block, dtype) for block in blocks]
        self._sizes = [weights[-1].start + weights[-1].nbytes for weights in self._weights]
        starts = list(itertools.accumulate((-(-size // HUGE_PAGE) * HUGE_PAGE for size in self._sizes), initial=0))
        self._host = host_memory(starts[-1], told=not passing)
        self._pinned: list[int] = []
        self._stored = [self._host[start : start + size] for start, size in zip(starts, self._sizes)]
        self._where = {id(weight.owner): (n, weight) for n, own in enumerate(self._weights) for weight in own}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[_Place] = []
        self._coming: deque[tuple[int, _Place]] = deque()
        self._locking = 0.0
        self._rounds: list[tuple[Any, Any]] = []
        """Events around each block's computing, of the last round."""

    def holds(self, owner: nn.Module) -> bool:
        """Whether a module's weight is one of the large ones here."""
        return id(owner) in self._where

    def put(self, owner: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Keep a weight; what to have in its place until it is used: the same in host memory."""
        number, known = self._where[id(owner)]
        if self._copies is not None and not known.start:
            self._page_lock(self._stored[number])
        kept = known.view(self._stored[number])
        assert kept.dtype == weight.dtype, (kept.dtype, weight.dtype)
        kept.copy_(weight)
        return kept

    def place(self, owner: nn.Module, leaf: str, value: torch.Tensor) -> torch.Tensor:
        """What to have in a module's place of a tensor that was loaded (see loading.assign): large weights go to host
        memory, the others stay on the device."""
        if leaf == "weight" and self.holds(owner):
            return self.put(owner, value)
        # A packed file's layer arrives in one piece of memory, all of which the smallest tensor of it would hold.
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value

    @contextlib.contextmanager
    def block(self, number: int) -> Iterator[None]:
        """``with``: the block's weights are on the device. Blocks are asked for in turn."""
        if not self._coming or self._coming[0][0] != number:
            self._start_over(number)
        _, place = self._coming.popleft()
        place.wait_for_copy()
        kept = [weight.owner._parameters["weight"] for weight in self._weights[number]]
        events = self._events(number)
        try:
            for weight in self._weights[number]:
                weight.owner._parameters["weight"] = nn.Parameter(weight.view(place.memory), requires_grad=False)
            yield
        finally:
            for weight, parameter in zip(self._weights[number], kept):
                weight.owner._parameters["weight"] = parameter
            place.used()
            if events is not None:
                events[1].record()
            self._use_again(place, number + 1 + len(self._coming))

    def _use_again(self, place: _Place, following: int) -> None:
        if not self._passing or following < len(self._stored):
            self._send(following % len(self._stored), place)
        else:
            # It was allocated on the stream that computes, as what is allocated next will be.
            self._places.clear()

    def _start_over(self, number: int) -> None:
        """Begin the row of copies at this block: at first, and after an error in the middle of a forward."""
        self._coming.clear()
        if not self._places:
            largest = max(self._sizes)
            count = 1 if self._passing else min(PLACES, len(self._stored))
            self._places = [_Place(largest, self._device, self._copies) for _ in range(count)]
        for step, place in enumerate(self._places):
            place.used()
            self._send((number + step) % len(self._stored), place)

    def _send(self, number: int, place: _Place) -> None:
        place.fill(self._stored[number])
        self._coming.append((number, place))

    def _events(self, number: int) -> tuple[Any, Any] | None:
        if self._copies is None:
            return None
        if number == 0:
            self._rounds.clear()
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        self._rounds.append(events)
        return events

    def copying_over_computing(self) -> float:
        """How many times as long copying all blocks takes as computing with them took in the last round; waits for it.

        0.0 where nothing is copied beside the computing.
        """
        if self._copies is None or not self._rounds:
            return 0.0
        torch.cuda.current_stream().synchronize()
        computing = sum(begin.elapsed_time(end) for begin, end in self._rounds) / 1e3
        copying = max(place.copy_seconds() for place in self._places) * sum(self._sizes) / max(self._sizes)
        return copying / computing

    def tell(self) -> None:
        """Log where the weights are."""
        gigabytes = sum(self._sizes) / 1e9
        locked = f", page-locked in {self._locking:.1f} s" if self._pinned else ""
        log.info("memory=streamed: %.1f GB of weights in host memory%s", gigabytes, locked)

    def pause(self) -> None:
        """Let the host's weights be changed: wait for copies on their way, which the next forward begins anew."""
        if self._copies is not None:
            self._copies.synchronize()
        self._coming.clear()

    def close(self) -> None:
        """Free the memory on the device and unlock the host's."""
        if self._copies is not None:
            torch.cuda.synchronize(self._device)
        self._coming.clear()
        self._places.clear()
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._pinned.clear()

    def _page_lock(self, memory: torch.Tensor) -> None:
        """From locked pages copies run at the bus's speed and beside everything else."""
        nbytes = -(-memory.nbytes // HUGE_PAGE) * HUGE_PAGE
        began = time.perf_counter()
        code = _cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)
        self._locking += time.perf_counter() - began
        if int(code) == 0:
            self._pinned.append(memory.data_ptr())
        elif len(self._pinned) == 0:
            log.warning(
                "host memory cannot be page-locked (CUDA error %d): blocks come at a fraction of the speed", code
            )


class _Place:
    """Memory on the device for one block at a time."""

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._stream = stream
        if stream is not None:
            self._begun, self._copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._free = torch.cuda.Event()

    def fill(self, source: torch.Tensor) -> None:
        """Copy a block's bytes here, once what was here has been used."""
        if self._stream is None:
            self.memory[: len(source)].copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free)
            self._begun.record(self._stream)
            self.memory[: len(source)].copy_(source, non_blocking=True)
            self._copied.record(self._stream)

    def wait_for_copy(self) -> None:
        """Have what is computed from now on wait for the bytes."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def used(self) -> None:
        """What was computed until now was all that needs the bytes."""
        if self._stream is not None:
            self._free.record(torch.cuda.current_stream())

    def copy_seconds(self) -> float:
        """Of the last copy that is over, waiting for it."""
        if self._stream is None:
            return 0.0
        self._copied.synchronize()
        return self._begun.elapsed_time(self._copied) / 1e3


def _cudart() -> Any:
    return torch.cuda.cudart()


def host_memory(nbytes: int, told: bool = True) -> torch.Tensor:
    """Bytes on the host, uint8: of memory where there is enough, else of a file on the disk, which is told if asked."""
    free = available_memory()
    if free is None or nbytes + SPARE_HOST_BYTES <= free:
        return _aligned(nbytes)
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    log.log(
        logging.WARNING if told else logging.DEBUG,
        "memory=streamed: %.1f GB of weights, %.1f GB of host memory free: they are read from %s for every forward, "
        "which is slow", nbytes / 1e9, free / 1e9, folder,
    )  # fmt: skip
    handle, path = tempfile.mkstemp(dir=folder, prefix="streamed-")
    try:
        os.posix_fallocate(handle, 0, nbytes)
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    finally:
        os.close(handle)
        os.unlink(path)  # its space is free again when the process ends, however it does


def _aligned(nbytes: int) -> torch.Tensor:
    """Memory that begins at a huge page and is made of them where the system has some: locking those is quick."""
    whole = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    memory = whole[-whole.data_ptr() % HUGE_PAGE :][:nbytes]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(nbytes), MADV_HUGEPAGE)
    return memory
