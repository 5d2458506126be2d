"""``executor=process``: the session lives in a supervised worker process.

The parent keeps plan, ledger and writing. A worker that dies or hangs is replaced and its items are drawn again; an
item that takes two workers with it is given up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import PendingImages, ReadyImages
from zimage_runner.executors.base import Batch, BatchResult, BrokenImages, Executor, SessionFactory
from zimage_runner.executors.blame import Blame, Flight, given_up_text
from zimage_runner.executors.child import WorkerDied
from zimage_runner.executors.messages import Drawn, Failed, Finished, Start, Started, SteppedDown, Work
from zimage_runner.executors.supervisor import Supervisor
from zimage_runner.executors.workers import WorkersConfig
from zimage_runner.memory.policies import Health
from zimage_runner.plan import Encoding
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.warmup import WarmupShape

BATCHES_AHEAD = 2
"""One being drawn, one waiting in the worker, so that it never waits for the parent."""


@dataclass(kw_only=True, slots=True)
class ProcessExecutorConfig(WorkersConfig):
    """A worker process that is replaced when it dies, hangs or grows."""

    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        supervisor = Supervisor(
            self,
            Start(make_session, auto_batch),
            Health() if health is None else health,
            StopRequest() if stop is None else stop,  # not "or": an unset request is false
        )
        return ProcessExecutor(supervisor, self.item_timeout_s)


class ProcessExecutor(Executor):
    """Feeds the worker, collects its results, and decides what a death means for the items it had."""

    def __init__(self, supervisor: Supervisor, item_timeout_s: float) -> None:
        self._supervisor = supervisor
        self._item_timeout_s = item_timeout_s
        self.batches_ahead = BATCHES_AHEAD
        self._flights: dict[int, Flight] = {}
        self._again: deque[Batch] = deque()
        """Batches taken back from dead workers: suspects (one item each) first."""
        self._blame = Blame()
        self._ticket = 0
        self._heard = 0.0

    def start(self) -> dict[str, Any]:
        _ = self._supervisor.child
        return self.report()

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> bool:
        self._supervisor.extend(shapes, texts)
        return True

    @property
    def is_lost(self) -> bool:
        return not self._flights and self._supervisor.is_lost

    def recover(self) -> None:
        self._supervisor.recover()

    def report(self) -> dict[str, Any]:
        return self._supervisor.report()

    def close(self) -> None:
        self._flights.clear()
        self._again.clear()
        self._supervisor.close()

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        try:
            yield from self._run(iter(batches))
        finally:
            self._again.clear()
            if self._flights:  # abandoned half-way: their results must not turn up in the next run
                self.close()

    def _run(self, source: Iterator[Batch]) -> Iterator[BatchResult]:
        while True:
            try:
                self._feed(source)
                if not self._flights:
                    return
                result = self._next_result()
            except WorkerDied as death:
                yield from self._take_back(death)
                self._supervisor.bury(death)
                if self._supervisor.stop:
                    return  # nothing is in flight any more
            else:
                if result is not None:
                    yield result

    def _feed(self, source: Iterator[Batch]) -> None:
        """Keep the worker busy; replace it first if it is due, once it is idle."""
        if self._supervisor.is_due:
            if self._flights:
                return
            self._supervisor.recycle()
        while len(self._flights) < self.batches_ahead:
            if self._blame.must_wait(self._flights.values(), self._again[0] if self._again else None):
                return
            batch = self._again.popleft() if self._again else next(source, None)
            if batch is None:
                return
            child = self._supervisor.child  # a new one is waited for: that is no item's time
            if not self._flights:
                self._heard = time.monotonic()
            self._ticket += 1
            self._flights[self._ticket] = Flight.of(batch)
            child.send(Work(self._ticket, batch))

    def _next_result(self) -> BatchResult | None:
        """Handle one message of the worker. Raises WorkerDied."""
        drawing = [len(f.missing) for f in self._flights.values() if f.started]
        limit = self._item_timeout_s * max([1, *drawing])
        message = self._supervisor.child.receive(max(0.0, self._heard + limit - time.monotonic()), limit)
        self._heard = time.monotonic()
        match message:
            case Started(ticket):
                self._flights[ticket].started = True
            case SteppedDown(step):
                self._supervisor.events.recovery.append(step)
            case Finished(ticket, report):
                del self._flights[ticket]
                self._supervisor.update(report)
            case Failed(ticket, positions, error, bad_picture, details):
                images = BrokenImages(error) if bad_picture else None
                return self._result(ticket, positions, images, None if bad_picture else error, details)
            case (Drawn(ticket, positions, _, details), pixels):
                return self._result(ticket, positions, ReadyImages(pixels), None, details)
        return None

    def _result(
        self, ticket: int, positions: list[int], images: PendingImages | None, error: str | None, details: dict
    ) -> BatchResult:
        flight = self._flights[ticket]
        self._supervisor.drew(len(positions))
        items = [flight.missing.pop(p) for p in positions]
        self._blame.forget(items)
        return BatchResult(items=items, images=images, error=error, details=details, attempt=flight.batch.attempt)

    def _take_back(self, death: WorkerDied) -> Iterator[BatchResult]:
        """Queue again what the dead worker had; give up the items that have now taken two with them."""
        flights, self._flights = [f for f in self._flights.values() if f.missing], {}
        again, given_up = self._blame.judge(flights)
        self._again.extendleft(reversed(again))
        for batch in given_up:
            self._supervisor.events.quarantined.append(batch.items[0].item_dir)
            yield BatchResult(items=batch.items, error=given_up_text(death), attempt=batch.attempt)
