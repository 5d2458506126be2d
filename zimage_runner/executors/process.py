"""``executor=process``: the session lives in a supervised worker process.

The parent keeps plan, ledger and writing. A worker that dies or hangs is replaced and its items are drawn again; an
item that takes two workers with it is given up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import PendingImages, ReadyImages
from zimage_runner.errors import check_range
from zimage_runner.executors.base import Batch, BatchResult, BrokenImages, Executor, ExecutorConfig, SessionFactory
from zimage_runner.executors.blame import Blame, Flight, given_up_text
from zimage_runner.executors.child import WorkerDied
from zimage_runner.executors.messages import Drawn, Failed, Finished, Start, Started, SteppedDown, Work
from zimage_runner.executors.supervisor import Supervisor
from zimage_runner.memory.policies import Action, Health
from zimage_runner.plan import Encoding
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.session import SessionConfig
    from zimage_runner.warmup import WarmupShape

BATCHES_AHEAD = 2
"""One being drawn, one waiting in the worker, so that it never waits for the parent."""


@dataclass(kw_only=True, slots=True)
class ProcessExecutorConfig(ExecutorConfig):
    """A worker process that is replaced when it dies, hangs or grows."""

    item_timeout_s: float = 1800.0
    """Seconds one picture may take before the worker counts as hung; a batch may take this for each of its items."""
    start_timeout_s: float = 3600.0
    """Seconds that loading and warm-up may take."""
    max_restarts: int = 5
    """Workers that may die one after the other without a single picture before the run stops (resumable)."""
    backoff_s: float = 1.0
    """Pause before the second restart in a row; doubled each time, up to a minute."""
    max_items_per_worker: int | None = None
    """Replace the worker after so many items, as a cure for slow leaks; null never does."""

    def __post_init__(self) -> None:
        for name in ("item_timeout_s", "start_timeout_s"):
            check_range(f"executor.{name}", getattr(self, name), 1e-3, 1e9)
        check_range("executor.max_restarts", self.max_restarts, 0, 1000)
        check_range("executor.backoff_s", self.backoff_s, 0, 3600)
        if self.max_items_per_worker is not None:
            check_range("executor.max_items_per_worker", self.max_items_per_worker, 1, 10**9)

    def adapt(self, session: SessionConfig) -> SessionConfig:
        """A large worker is replaced as a whole; its session need not rebuild itself as well."""
        health = replace(session.memory.health, action=Action.warn)
        return replace(session, memory=replace(session.memory, health=health))

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
        while len(self._flights) < self.batches_ahead and not self._must_wait():
            batch = self._again.popleft() if self._again else next(source, None)
            if batch is None:
                return
            if not self._flights:
                self._heard = time.monotonic()
            self._ticket += 1
            self._flights[self._ticket] = Flight.of(batch)
            self._supervisor.child.send(Work(self._ticket, batch))

    def _must_wait(self) -> bool:
        return self._blame.must_wait(self._flights.values(), self._again[0] if self._again else None)

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
                self._supervisor.story.recovery.append(step)
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
            self._supervisor.story.quarantined.append(batch.items[0].item_dir)
            yield BatchResult(items=batch.items, error=given_up_text(death), attempt=batch.attempt)
