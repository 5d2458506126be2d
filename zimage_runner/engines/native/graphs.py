"""CUDA graphs: one launch instead of hundreds, for shapes that repeat.

A graph is captured when its shape comes the second time: a single picture never pays for a capture, and kernels are
compiled and tuned before one. All graphs share one memory pool, because they never run at the same time and nothing
in the pool outlives a replay.

A recording is a gain and never a need: where there is no memory for one, the call is made without. While one is under
way torch's allocator gives nothing of its cache back to the GPU, so that is done before.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from zimage_runner.engines.faults import is_out_of_memory
from zimage_runner.errors import error_text
from zimage_runner.memory.readings import release_unused

log = logging.getLogger(__name__)

Function = Callable[..., torch.Tensor]


class Captured(Protocol):
    """A recorded call: new inputs in, the output tensor (overwritten by the next call) out."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor: ...


class CudaGraphCall:
    """A recorded call of ``function`` on tensors of the same shapes."""

    def __init__(self, function: Function, inputs: Sequence[torch.Tensor], pool: Any) -> None:
        """Raises whatever ``function`` raises, and torch.OutOfMemoryError; later recordings are not harmed by it."""
        # Inputs and output lie outside the pool, so that no other graph's replay can overwrite them.
        self.inputs = [x.clone() for x in inputs]
        self.output = torch.empty_like(function(*self.inputs))
        # torch.cuda.graph() would do much the same, but import torch.compiler and all that a lean import put off.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        try:
            self._record(function, pool)
        except BaseException:
            self.graph.reset()  # now: garbage that goes during another recording would spoil that one
            raise
        finally:
            # cuBLAS keeps the work area that it took from the pool, and with it the pool when the graph is gone. The
            # graph itself needs no more than that the pool's memory stays.
            torch._C._cuda_clearCublasWorkspaces()

    def _record(self, function: Function, pool: Any) -> None:
        # thread_local: what other threads do meanwhile, such as waiting for pictures, is no part of it.
        with torch.cuda.stream(capture_stream()):
            try:
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                self.output.copy_(function(*self.inputs))
            finally:
                end_capture(self.graph, pool)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        for static, new in zip(self.inputs, inputs):
            static.copy_(new)
        self.graph.replay()
        return self.output


def end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a recording, also one that CUDA calls invalid.

    torch's capture_end raises then and leaves its allocator in the state of recording, in which it gives no cached
    memory back, not even when there is no other left.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError, AttributeError):  # it had got past this when it failed
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise


@lru_cache(1)
def capture_stream() -> torch.cuda.Stream:
    """One for all recordings, because they share a memory pool."""
    return torch.cuda.Stream()


class GraphCache:
    """At most ``capacity`` recorded calls, least recently used forgotten first; capacity 0 records nothing."""

    def __init__(
        self, capacity: int, capture: Callable[[Function, Sequence[torch.Tensor]], Captured] | None = None
    ) -> None:
        self.capacity = capacity
        self._capture = capture or self._capture_cuda
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._calls: OrderedDict[Hashable, Captured] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._calls)

    def call(
        self, key: Hashable, function: Function, inputs: Sequence[torch.Tensor], first: bool = True
    ) -> torch.Tensor:
        """``function(*inputs)``, through a recording if ``key`` came before.

        ``key`` must determine the shapes and everything else that ``function`` reads. ``first`` says that this is
        the first call of a loop: a recording is only begun there, so that one loop is not half eager.
        """
        call = self._calls.get(key)
        if call is None and self.capacity and first and key in self._seen and key not in self._refused:
            call = self._record(key, function, inputs)
        self._seen.add(key)
        if call is None:
            return function(*inputs)
        self._calls.move_to_end(key)
        return call(inputs)

    def give_up(self) -> bool:
        """Forget all recordings for want of memory, and make these no more; whether there were any.

        Others may be made: those of smaller batches need less.
        """
        held = bool(self._calls)
        self._refused.update(self._calls)
        self.clear()
        return held

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        if self._calls and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._calls.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, function: Function, inputs: Sequence[torch.Tensor]) -> Captured | None:
        """The recording; None where none can be made, which is not tried again for ``key``."""
        # Evict before capturing, never during: freeing a graph's memory under a capture corrupts the pool.
        while len(self._calls) >= self.capacity:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._calls.popitem(last=False)
        try:
            self._calls[key] = call = self._capture(function, inputs)
            return call
        except RuntimeError as error:  # what is wrong with more than the recording, the call without it will meet
            self._refuse(key, error)
        # Outside the except block, where the error no longer keeps the recording's tensors alive.
        release_unused()
        return None

    def _refuse(self, key: Hashable, error: RuntimeError) -> None:
        self._refused.add(key)
        if is_out_of_memory(error):
            log.info("no memory for a CUDA graph of %s (latents, caption tokens): drawn without", key)
            return
        self.capacity = 0
        log.warning("no CUDA graphs from now on: one could not be recorded (%s)", error_text(error))

    def _capture_cuda(self, function: Function, inputs: Sequence[torch.Tensor]) -> Captured:
        if not self._calls:  # torch refuses a pool whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraphCall(function, inputs, self._pool)
