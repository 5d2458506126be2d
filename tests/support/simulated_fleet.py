"""A fleet without Ray: workers that draw at once, in a random order, and die where they are told to."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.faulty_session import picture
from zimage_runner.errors import UserError
from zimage_runner.executors.base import Batch, Sink
from zimage_runner.executors.fleet import Died, Done, Event, Hired, Notice, Part, Ready, Refused
from zimage_runner.plan import Encoding

REPORT: dict[str, Any] = {
    "phases": {"load": 1.0}, "numerics": {"engine": "simulated"}, "versions": {}, "gpu_memory": {},
}  # fmt: skip


def drawn_parts(batch: Batch, sink: Sink | None) -> list[Part]:
    """The right pictures of a batch."""
    pixels = np.stack([picture(i.prompt.text, i.seed, i.params.height, i.params.width) for i in batch.items])
    positions = list(range(len(batch.items)))
    if sink is None:
        return [Part(positions=positions, pixels=pixels, details={"worker": "one"})]
    return [Part(positions=positions, written=sink.write(batch.items, pixels, {"worker": "one"}, batch.attempt))]


class SimulatedFleet:
    """See Fleet. ``places`` may be changed while it runs."""

    def __init__(
        self, places: int = 3, *, deadly: dict[int, int] | None = None, seed: int = 0,
        draw: Callable[[Batch, Sink | None], list[Part]] = drawn_parts,
    ) -> None:  # fmt: skip
        """``deadly``: seed of an item -> how many workers it takes with it."""
        self.room = places
        self.deadly = Counter(deadly or {})
        self.fails_node: Counter[int] = Counter()
        """Seed of an item -> how often the node of its worker fails meanwhile."""
        self.hangs: set[int] = set()
        """Seeds of items that are never drawn."""
        self.reports: dict[int, dict[str, Any]] = {}
        """What single workers report instead of REPORT."""
        self.refusal: str | None = None
        self.elsewhere = False
        self.sinks: dict[int, tuple[Sink | None, bool]] = {}
        self.unseen: list[str] = []
        """What sinks said that could not be opened."""
        self.hired: list[int] = []
        self.most_in_flight = 0
        self.shapes_of: dict[int, list[Any]] = {}
        self._draw = draw
        self._random = random.Random(seed)
        self._batches: dict[int, list[tuple[int, Batch]]] = {}
        self._events: list[tuple[int, Event]] = []
        self.closed = False
        self.pace = 0.7
        """Share of the busy workers that finish a batch between two looks at them."""

    def connect(self) -> None:
        pass

    def places(self) -> int:
        return self.room

    def hire(self, worker: int) -> None:
        self.hired.append(worker)
        self._batches[worker] = []
        if len(self._batches) <= self.room:
            self._events.append((worker, Hired(node=f"node{worker % 2}", is_elsewhere=self.elsewhere)))

    def load(self, worker: int) -> None:
        event = Refused(message=self.refusal) if self.refusal else Ready(report=self.reports.get(worker, REPORT))
        self._events.append((worker, event))

    def extend(self, worker: int, shapes: Sequence[Any], texts: Sequence[Encoding]) -> None:
        self._events.append((worker, Ready(report=REPORT)))

    def equip(self, worker: int, sink: Sink | None, *, must: bool) -> None:
        if sink is not None:
            copy: Sink = pickle.loads(pickle.dumps(sink))
            try:
                copy.open()
                sink = copy
            except UserError as error:
                self.unseen.append(str(error))
                sink = None
        self.sinks[worker] = (sink, must)

    def draw(self, worker: int, ticket: int, batch: Batch) -> None:
        if worker not in self._batches:
            return  # it died, and nobody has looked yet
        self._batches[worker].append((ticket, batch))
        self.shapes_of.setdefault(worker, []).append(batch.items[0].bucket)
        self.most_in_flight = max(self.most_in_flight, sum(map(len, self._batches.values())))

    def kill(self, worker: int, *, blameless: bool = False) -> None:
        """End a worker from outside, as soon as somebody looks."""
        started = frozenset(ticket for ticket, _ in self._batches.pop(worker)[:1])
        self._events.append((worker, Died(how="was killed", started=started, blameless=blameless)))

    @property
    def living(self) -> list[int]:
        return list(self._batches)

    def poll(self, timeout_s: float) -> list[Notice]:
        events, self._events = self._events, []
        for worker, waiting in list(self._batches.items()):
            if waiting and self._random.random() < self.pace:
                event = self._next(worker)
                if event is not None:
                    events.append((worker, event))
        self._random.shuffle(events)
        return [Notice(worker, lambda event=event: event) for worker, event in events]

    def _next(self, worker: int) -> Event | None:
        ticket, batch = self._batches[worker][0]
        seeds = {item.seed for item in batch.items}
        if seeds & self.hangs:
            return None
        for seed in seeds:
            for deaths in (self.deadly, self.fails_node):
                if deaths[seed] > 0:
                    deaths[seed] -= 1
                    del self._batches[worker]
                    blameless = deaths is self.fails_node
                    return Died(how="died", started=frozenset([ticket]), blameless=blameless)
        del self._batches[worker][0]
        report = self.reports.get(worker, REPORT)
        parts = self._draw(batch, self.sinks[worker][0])
        return Done(ticket=ticket, parts=parts, report=report, seconds=0.01)

    def fire(self, worker: int) -> None:
        self._batches.pop(worker, None)

    def describe(self) -> str:
        return "a worker asks for GPU: 1; the nodes have GPU: 0"

    def close(self) -> None:
        self.closed = True
        self._batches.clear()
