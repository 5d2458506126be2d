"""CUDA graphs: one launch instead of hundreds, for shapes that repeat.

A graph is captured when its shape comes the second time: a single picture never pays for a capture, and kernels are
compiled and tuned before one. All graphs share one memory pool, because they never run at the same time and nothing
in the pool outlives a replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

Function = Callable[..., torch.Tensor]


class Captured(Protocol):
    """A recorded call: new inputs in, the output tensor (overwritten by the next call) out."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor: ...


class CudaGraphCall:
    """A recorded call of ``function`` on tensors of the same shapes."""

    def __init__(self, function: Function, inputs: Sequence[torch.Tensor], pool: Any) -> None:
        # Inputs and output lie outside the pool, so that no other graph's replay can overwrite them.
        self.inputs = [x.clone() for x in inputs]
        self.output = torch.empty_like(function(*self.inputs))
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() would do the same, but import torch.compiler and all that a lean import put off.
        with torch.cuda.stream(capture_stream()):
            self.graph.capture_begin(pool=pool)
            try:
                self.output.copy_(function(*self.inputs))
            finally:
                self.graph.capture_end()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        for static, new in zip(self.inputs, inputs):
            static.copy_(new)
        self.graph.replay()
        return self.output


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
        if call is None and self.capacity and first and key in self._seen:
            call = self._record(key, function, inputs)
        self._seen.add(key)
        if call is None:
            return function(*inputs)
        self._calls.move_to_end(key)
        return call(inputs)

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        if self._calls and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._calls.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, function: Function, inputs: Sequence[torch.Tensor]) -> Captured:
        # Evict before capturing, never during: freeing a graph's memory under a capture corrupts the pool.
        while len(self._calls) >= self.capacity:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._calls.popitem(last=False)
        self._calls[key] = call = self._capture(function, inputs)
        return call

    def _capture_cuda(self, function: Function, inputs: Sequence[torch.Tensor]) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraphCall(function, inputs, self._pool)
