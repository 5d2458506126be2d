"""``executor=process``: the session lives in a supervised worker process.

The parent keeps plan, ledger and writing. A worker that dies or hangs is replaced and its items are drawn again; an
item that takes two workers with it is given up.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import ReadyImages
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.executors.base import Batch, BatchResult, BrokenImages, Executor, ExecutorConfig, SessionFactory
from zimage_runner.executors.child import Child, WorkerBroken, WorkerDied
from zimage_runner.executors.messages import Drawn, Failed, Finished, Start, Started, Work
from zimage_runner.memory import Health
from zimage_runner.memory.health import Action
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""One being drawn, one waiting in the worker, so that it never waits for the parent."""
DEADLY = 2
"""Workers that an item may take with it before it is given up."""
LONGEST_PAUSE_S = 60.0


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
            _check(name, getattr(self, name), 1e-3, 1e9)
        _check("max_restarts", self.max_restarts, 0, 1000)
        _check("backoff_s", self.backoff_s, 0, 3600)
        if self.max_items_per_worker is not None:
            _check("max_items_per_worker", self.max_items_per_worker, 1, 10**9)

    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        start = Start(make_session, auto_batch)
        return ProcessExecutor(self, start, health or Health(), stop or StopRequest())


def _check(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails too.
    if not low <= value <= high:
        raise UserError(f"executor.{name}={value} is out of range: use {low:g} to {high:g}")


@dataclass(slots=True)
class _Flight:
    """A batch that the worker has."""

    batch: Batch
    missing: dict[int, WorkItem]
    """Position -> item, of those without a result."""
    started: bool = False


@dataclass(slots=True)
class _Story:
    """What happened to the workers, for the report."""

    deaths: list[str] = field(default_factory=list)
    recycled: int = 0
    quarantined: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "process",
            "restarts": len(self.deaths),
            "deaths": self.deaths[:100],
            "recycled": self.recycled,
            "quarantined": self.quarantined[:1000],
        }


class ProcessExecutor(Executor):
    """Supervises one worker at a time. Used from one thread, the one that lives as long as the run."""

    def __init__(self, config: ProcessExecutorConfig, start: Start, health: Health, stop: StopRequest) -> None:
        self._config = config
        self._start = start
        self._health = health
        self._stop = stop
        self._child: Child | None = None
        self._report: dict[str, Any] = {}
        self._story = _Story()
        self._flights: dict[int, _Flight] = {}
        self._again: deque[Batch] = deque()
        self._kills: Counter[str] = Counter()
        self._ticket = 0
        self._deaths_in_a_row = 0
        self._items_drawn = 0
        self._heard = 0.0
        self._replaces_large = health.action is Action.recycle
        self._recovery_before: list[str] = []

    def start(self) -> dict[str, Any]:
        self._spawn()
        return self.report()

    def report(self) -> dict[str, Any]:
        return {**self._report, "executor": self._story.to_dict()}

    def close(self) -> None:
        child, self._child = self._child, None
        self._flights.clear()
        self._again.clear()
        if child is not None:
            child.close()

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        try:
            yield from self._run(iter(batches))
        finally:
            if self._flights:  # abandoned half-way: their results must not turn up in the next run
                self.close()
            self._again.clear()

    def _run(self, source: Iterator[Batch]) -> Iterator[BatchResult]:
        while True:
            try:
                if self._child is None:
                    self._spawn()
                self._feed(source)
                if not self._flights:
                    return
                result = self._next_result()
            except WorkerDied as death:
                yield from self._bury(death)
                if self._stop:
                    return  # nothing is in flight any more
            else:
                if result is not None:
                    yield result

    def _feed(self, source: Iterator[Batch]) -> None:
        """Keep the worker busy; replace it first if it is due and idle."""
        if self._is_due():
            if self._flights:
                return
            self._recycle()
        while len(self._flights) < BATCHES_AHEAD:
            suspected = any(self._kills[i.item_dir] for f in self._flights.values() for i in f.batch.items)
            if suspected:
                return  # alone, so that a further death is its own doing
            if self._again and self._flights and self._kills[self._again[0].items[0].item_dir]:
                return
            batch = self._again.popleft() if self._again else next(source, None)
            if batch is None:
                return
            self._ticket += 1
            self._flights[self._ticket] = _Flight(batch, dict(enumerate(batch.items)))
            self._heard = time.monotonic() if len(self._flights) == 1 else self._heard
            self._worker.send(Work(self._ticket, batch))

    def _next_result(self) -> BatchResult | None:
        """Handle one message of the worker. Raises WorkerDied."""
        started = [f for f in self._flights.values() if f.started] or list(self._flights.values())[:1]
        limit = self._config.item_timeout_s * max(len(f.missing) for f in started)
        message = self._worker.receive(max(0.0, self._heard + limit - time.monotonic()), limit)
        self._heard = time.monotonic()
        match message:
            case Started(ticket):
                self._flights[ticket].started = True
            case Finished(ticket, report):
                del self._flights[ticket]
                self._update(report)
            case Failed(ticket, positions, error, bad_picture, details):
                images = BrokenImages(error) if bad_picture else None
                return self._result(ticket, positions, images, None if bad_picture else error, details)
            case (Drawn(ticket, positions, _, details), pixels):
                return self._result(ticket, positions, ReadyImages(pixels), None, details)
        return None

    def _result(
        self, ticket: int, positions: list[int], images: Any, error: str | None, details: dict[str, Any]
    ) -> BatchResult:
        flight = self._flights[ticket]
        self._deaths_in_a_row = 0
        self._items_drawn += len(positions)
        items = [flight.missing.pop(p) for p in positions]
        return BatchResult(items=items, images=images, error=error, details=details, attempt=flight.batch.attempt)

    def _bury(self, death: WorkerDied) -> Iterator[BatchResult]:
        """Take back what the dead worker had; give up the items that have now taken two with them."""
        self._child = None
        self._record(death)
        flights, self._flights = list(self._flights.values()), {}
        innocent: list[Batch] = []
        suspects: list[Batch] = []
        for flight in flights:
            attempt = flight.batch.attempt
            if not flight.missing:
                continue
            if not flight.started:
                innocent.append(Batch(items=list(flight.missing.values()), attempt=attempt))
                continue
            for item in flight.missing.values():
                self._kills[item.item_dir] += 1
                if self._kills[item.item_dir] < DEADLY:
                    suspects.append(Batch(items=[item], attempt=attempt))
                    continue
                self._story.quarantined.append(item.item_dir)
                error = f"given up: {DEADLY} worker processes died drawing this (the last one {death})"
                yield BatchResult(items=[item], error=error, attempt=attempt)
        self._again.extendleft(reversed(suspects + innocent))

    def _record(self, death: WorkerDied) -> None:
        self._story.deaths.append(str(death))
        self._deaths_in_a_row += 1
        log.warning("the worker process %s", death)
        if self._deaths_in_a_row > self._config.max_restarts:
            raise RunStopped(
                f"{self._deaths_in_a_row} worker processes died one after the other without drawing a picture; "
                f"the last one {death}"
            )

    def _spawn(self) -> None:
        """Start a worker, again and again if need be. Raises RunStopped or UserError when that is hopeless."""
        while True:
            pause = min(LONGEST_PAUSE_S, self._config.backoff_s * 2 ** (self._deaths_in_a_row - 2))
            if self._deaths_in_a_row > 1 and self._stop.wait(pause):
                raise RunStopped("the run was asked to end while its worker process was being replaced")
            self._child = Child()
            try:
                report = self._child.start(self._start, self._config.start_timeout_s)
            except WorkerDied as death:
                self._child = None
                self._record(death)
                if isinstance(death, WorkerBroken) and not self._report:
                    raise RunStopped(f"the worker process cannot start: it {death}") from None
                continue
            except UserError as error:
                if self._report:
                    raise RunStopped(f"the worker process cannot be replaced: {error}") from None
                raise
            break
        self._check_same(report)
        self._recovery_before = self._report.get("recovery", [])
        self._update(report)
        self._items_drawn = 0
        self._check_limit()
        log.info("worker process %d is ready", self._child.pid)

    def _update(self, report: dict[str, Any]) -> None:
        """Take over a worker's report; phases stay the first worker's, and recovery steps are those of all."""
        self._report = {**report, "phases": self._report.get("phases") or report.get("phases", {})}
        if steps := [*self._recovery_before, *report.get("recovery", [])]:
            self._report["recovery"] = steps

    def _check_limit(self) -> None:
        """A worker that is too large when fresh would be replaced for ever."""
        limit, reserved = self._health.max_reserved_gb, self._reserved_gb
        if limit is not None and reserved > limit and self._replaces_large:
            log.warning(
                "memory.health.max_reserved_gb=%g is less than what a fresh worker process needs (%.1f GB): "
                "it is not replaced for that",
                limit,
                reserved,
            )
            self._replaces_large = False

    def _check_same(self, report: dict[str, Any]) -> None:
        """A new worker must compute as the first one did: a GPU that vanished would give other pictures, slowly."""
        before = self._report.get("numerics")
        if before is not None and report.get("numerics") != before:
            raise RunStopped(
                f"the new worker process computes with {report.get('numerics')}, the first one with {before}"
            )

    def _is_due(self) -> bool:
        most = self._config.max_items_per_worker
        if most is not None and self._items_drawn >= most:
            return True
        limit = self._health.max_reserved_gb
        return self._replaces_large and limit is not None and self._reserved_gb > limit

    def _recycle(self) -> None:
        log.info("replacing the worker process after %d items", self._items_drawn)
        self._worker.close()
        self._child = None
        self._story.recycled += 1
        self._spawn()

    @property
    def _reserved_gb(self) -> float:
        return self._report.get("gpu_memory", {}).get("reserved_gb", 0.0)

    @property
    def _worker(self) -> Child:
        if self._child is None:
            raise RuntimeError("the executor was not started")
        return self._child
