"""Drawing a batch so that as many of its pictures as possible come out.

Out of memory: the same without what the engine kept only to be faster; then half the batch, down to one picture; then
the VAE in tiles. What worked is remembered for pictures of that size. Any other error: the items one by one, so that
only the culprit fails.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import MOST_AUTO_BATCH
from zimage_runner.engines.faults import DeviceLost, is_device_lost, is_out_of_memory
from zimage_runner.errors import RunStopped, UserError, error_text
from zimage_runner.executors.base import Batch, BatchResult, SessionLike
from zimage_runner.memory.readings import BatchMemory, gpu_memory, release_unused

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

Shape = tuple[int, int, bool]
"""height, width, guidance: what a picture's memory depends on most."""


class MemoryBackoff:
    """Draws batches on one session and remembers what its memory allows."""

    def __init__(
        self, session: SessionLike, *, auto_batch: bool = False, on_step: Callable[[str], None] = lambda step: None
    ) -> None:
        """``on_step`` hears of every step down when it is taken."""
        self._session = session
        self._on_step = on_step
        self._auto_batch = auto_batch
        self._limits: dict[Shape, int] = {}
        self._halved: set[Shape] = set()
        self._tiled: set[Shape] = set()
        self.steps: list[str] = []
        """Every step down that was taken, for the summary."""

    def run(self, batch: Batch) -> Iterator[BatchResult]:
        """The results of a batch, in one or more parts. Raises DeviceLost when nothing can be drawn any more."""
        shape = _shape(batch.items[0])
        waiting = deque(batch.items)
        while waiting:
            count = min(len(waiting), self._limit(shape))
            yield from self._draw([waiting.popleft() for _ in range(count)], shape, batch.attempt)

    def report(self) -> dict[str, Any]:
        """Plain data for the session's report; empty when everything fitted."""
        sizes = {f"{w}x{h}{' guided' if guided else ''}": n for (h, w, guided), n in self._limits.items()}
        found: dict[str, Any] = {"batch_sizes": sizes} if sizes else {}
        return found | ({"recovery": list(self.steps)} if self.steps else {})

    def _limit(self, shape: Shape) -> int:
        # With auto_batch the first picture of a size is drawn alone, and measured.
        return self._limits.get(shape, 1 if self._auto_batch else sys.maxsize)

    def _draw(
        self, items: Sequence[WorkItem], shape: Shape, attempt: int, again: bool = False
    ) -> Iterator[BatchResult]:
        """``again``: the batch has run out of memory at this size before, and some was freed."""
        memory = BatchMemory() if self._auto_batch and shape not in self._limits else None
        try:
            done = self._session.generate(items, attempt=attempt, tiled=shape in self._tiled)
        except (UserError, RunStopped):
            raise
        except Exception as error:  # the item boundary: whatever it is, it becomes the item's error
            log.debug("batch failed", exc_info=True)
            message, exhausted, lost = error_text(error), is_out_of_memory(error), is_device_lost(error)
        else:
            if memory is not None:
                most = self._session.useful_batch() or MOST_AUTO_BATCH
                self._limits[shape] = memory.pictures_that_fit(min(most, MOST_AUTO_BATCH))
                log.info("engine.batch_size=auto: %d pictures of %dx%d", self._limits[shape], shape[1], shape[0])
            reading = gpu_memory()
            details = {"batch_size": len(items), **({"gpu_memory": reading} if reading else {}), **done.details}
            unusual = {
                "smaller batch for want of memory": shape in self._halved,
                "VAE decoded in tiles": shape in self._tiled,
                "VAE decoded in float32": attempt > 1,
            }
            if steps := [step for step, taken in unusual.items() if taken]:
                details = {**details, "recovery": [*details.get("recovery", []), *steps]}
            yield BatchResult(items=items, images=done.images, details=details, attempt=attempt)
            return
        # Outside the except block, where the error no longer keeps the failed call's tensors alive.
        if lost:
            raise DeviceLost(f"the GPU can no longer be used ({message})")
        if exhausted:
            if self._make_room(len(items), shape) and not again:
                yield from self._draw(items, shape, attempt, again=True)
                return
            if self._step_down(len(items), shape):
                yield from self.run(Batch(items=items, attempt=attempt))
                return
        if len(items) == 1:
            yield BatchResult(items=items, error=message, attempt=attempt)
            return
        log.warning("a batch of %d failed (%s): drawing its pictures one by one", len(items), message)
        for item in items:
            yield from self._draw([item], shape, attempt)

    def _make_room(self, count: int, shape: Shape) -> bool:
        """Free what can be freed; whether the same batch may fit then."""
        freed = self._session.free_memory()
        release_unused()
        if freed:
            self._note(f"out of memory with {_pictures(count, shape)}: CUDA graphs and caches are given up")
        # A single picture that cannot be decoded in tiles has this one chance more.
        return freed or (count == 1 and not self._session.tiles)

    def _step_down(self, count: int, shape: Shape) -> bool:
        """Take the next step for pictures of this shape; False when there is none left."""
        trouble = f"out of memory with {_pictures(count, shape)}"
        if count > 1:
            self._limits[shape] = count // 2
            self._halved.add(shape)
            self._note(f"{trouble}: {count // 2} at a time from now on")
            return True
        if self._session.tiles and shape not in self._tiled:
            self._tiled.add(shape)
            self._note(f"{trouble}: decoding in tiles from now on")
            return True
        return False

    def _note(self, step: str) -> None:
        log.warning("%s", step)
        self.steps.append(step)
        self._on_step(step)


def _pictures(count: int, shape: Shape) -> str:
    return f"{'one picture' if count == 1 else f'{count} pictures'} of {shape[1]}x{shape[0]}"


def _shape(item: WorkItem) -> Shape:
    return (item.params.height, item.params.width, item.params.uses_guidance)
