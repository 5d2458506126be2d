"""Which items are to blame when a worker dies: one rule for every executor that replaces its workers.

One of the items that a dead worker was drawing may be the cause. They are drawn again, one at a time and alone in their
worker, so that a second death shows which item it is. Items that were only waiting in that worker are not suspected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zimage_runner.executors.base import Batch

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem

DEADLY = 2
"""Workers that an item may take with it before it is given up."""


@dataclass(slots=True)
class Flight:
    """A batch that a worker has."""

    batch: Batch
    missing: dict[int, WorkItem] = field(default_factory=dict)
    """Position -> item, of those without a result."""
    started: bool = False
    """Whether it is being drawn; otherwise it waits in the worker."""

    @classmethod
    def of(cls, batch: Batch) -> Flight:
        """Return the flight of a batch that has no result yet."""
        return cls(batch, dict(enumerate(batch.items)))


class Blame:
    """Counts the workers that each item has taken with it."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def must_wait(self, flights: Iterable[Flight], following: Batch | None) -> bool:
        """Whether a worker with these flights must not get another batch, or not ``following``.

        A suspect is drawn alone, so that a further death is its own doing.
        """
        flying = [item for flight in flights for item in flight.batch.items]
        return bool(flying) and (
            self.is_suspect(flying) or (following is not None and self.is_suspect(following.items))
        )

    def is_suspect(self, items: Iterable[WorkItem]) -> bool:
        """Whether one of these items was being drawn when a worker died."""
        return any(item.item_dir in self._deaths for item in items) if self._deaths else False

    def judge(self, flights: Sequence[Flight]) -> tuple[list[Batch], list[Batch]]:
        """Return what of a dead worker's flights is drawn again (suspects first, one a batch), and what is given up."""
        again: list[Batch] = []
        given_up: list[Batch] = []
        for flight in flights:
            for item in flight.missing.values() if flight.started else ():
                self._deaths[item.item_dir] += 1
                alone = Batch(items=[item], attempt=flight.batch.attempt)
                (again if self._deaths[item.item_dir] < DEADLY else given_up).append(alone)
        self.forget(item for batch in given_up for item in batch.items)
        return again + self.acquit(flight for flight in flights if not flight.started), given_up

    def forget(self, items: Iterable[WorkItem]) -> None:
        """These are settled: another run, or a request, may have items of the same names."""
        for item in items if self._deaths else ():
            self._deaths.pop(item.item_dir, None)

    @staticmethod
    def acquit(flights: Iterable[Flight]) -> list[Batch]:
        """Return what is drawn again of flights that are not to blame: the node failed, or the worker was replaced."""
        return [Batch(items=list(f.missing.values()), attempt=f.batch.attempt) for f in flights if f.missing]


def given_up_text(death: object) -> str:
    """Why an item has failed, for its record."""
    return f"given up: {DEADLY} worker processes died drawing this (the last one {death})"
