"""The plan as a queue for many workers: read a little ahead, so that each can keep to its own shapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from zimage_runner.executors.base import Batch

if TYPE_CHECKING:
    from zimage_runner.plan.items import Bucket


class BatchQueue:
    """Hands out each batch once, and once more what is given back."""

    def __init__(self, source: Iterator[Batch], window: int) -> None:
        """``window``: batches to read ahead of those that are handed out. Bounds the memory."""
        self.window = window
        self._source = source
        self._again: deque[Batch] = deque()
        self._ahead: dict[Bucket, deque[Batch]] = {}
        self._count = 0
        self._ended = False

    def give_back(self, batches: Sequence[Batch]) -> None:
        """Queue these before all others, in their order."""
        self._again.extendleft(reversed(batches))

    def drop(self) -> None:
        """Hand out nothing more."""
        self._again.clear()
        self._ahead.clear()
        self._count = 0
        self._ended = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to hand out."""
        self._read()
        return not self._again and not self._ahead

    def __len__(self) -> int:
        """Batches that are at hand."""
        self._read()
        return len(self._again) + self._count

    def peek(self) -> Batch | None:
        """Return the batch that was given back and comes next; None without one."""
        return self._again[0] if self._again else None

    def take(self, shape: Bucket | None = None, drawing: Mapping[Bucket, int] | None = None) -> Batch | None:
        """Return the next batch for a worker whose last one was of ``shape``; None when there is none.

        What was given back comes first, then the worker's own shape, then the one with the most batches for each of the
        workers that draw it already (``drawing``).
        """
        if self._again:
            return self._again.popleft()
        self._read()
        if not self._ahead:
            return None
        if shape not in self._ahead:
            workers = drawing or {}
            shape = max(self._ahead, key=lambda bucket: len(self._ahead[bucket]) / (1 + workers.get(bucket, 0)))
        waiting = self._ahead[shape]  # type: ignore[index]
        batch = waiting.popleft()
        self._count -= 1
        if not waiting:
            del self._ahead[shape]  # type: ignore[arg-type]
        return batch

    def _read(self) -> None:
        while not self._ended and self._count < self.window:
            batch = next(self._source, None)
            if batch is None:
                self._ended = True
                return
            self._ahead.setdefault(batch.items[0].bucket, deque()).append(batch)
            self._count += 1
