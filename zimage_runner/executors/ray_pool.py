"""The workers of ``executor=ray``: who is asked for, who gets which batch, and what a death means.

Nothing here knows Ray: a Fleet (fleet.py) runs the workers. So the same code is measured with a thousand that are
simulated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import ReadyImages
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.executors.base import Batch, BatchResult, BrokenImages, Executor, Sink
from zimage_runner.executors.blame import Blame, Flight, given_up_text
from zimage_runner.executors.fleet import Died, Done, Event, Fleet, Hired, Notice, Ready, Refused, Stopped
from zimage_runner.executors.queue import BatchQueue
from zimage_runner.executors.ray_member import BATCHES_AHEAD, Member, Roster, State
from zimage_runner.executors.ray_options import RayOptions, Writes
from zimage_runner.executors.worker_events import WorkerEvents, merged
from zimage_runner.memory.policies import Action, Health
from zimage_runner.plan import Encoding
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.warmup import WarmupShape

log = logging.getLogger(__name__)

READ_AHEAD = 8
"""Batches for each worker that are read ahead, for the choice of those of its shape."""
POLL_S = 1.0
"""How often the time limits and the number of workers are looked at while nothing happens."""
LONGEST_PAUSE_S = 60.0


class RayExecutor(Executor):
    """Feeds the workers, collects their results, and replaces those that die, hang or grow."""

    has_workers_elsewhere = True

    def __init__(self, config: RayOptions, fleet: Fleet, health: Health, stop: StopRequest) -> None:
        self._config = config
        self._fleet = fleet
        self._health = health
        self._stop = stop
        self._events = WorkerEvents("ray")
        self._blame = Blame()
        self._roster = Roster()
        self._extensions: list[tuple[Sequence[WarmupShape], Sequence[Encoding]]] = []
        self._report: dict[str, Any] = {}
        self._sink: Sink | None = None
        self._queue = BatchQueue(iter(()), 1)
        self._ticket = 0
        self._deaths_in_a_row = 0
        self._no_hire_before = 0.0
        self._next_look = 0.0
        self._least = 1
        self._most = 0
        """Workers there have been at the same time."""
        self._due_gb = health.max_reserved_gb if health.action is Action.recycle else None

    def start(self) -> dict[str, Any]:
        self._fleet.connect()
        bounds = self._config.bounds
        self._least = bounds[0] if bounds else 1
        if bounds is None and self._fleet.places() < 1:
            raise UserError(f"executor=ray: no worker finds room: {self._fleet.describe()}")
        began = time.monotonic()
        while len(self._roster.ready) < self._least:
            self._hire()
            if time.monotonic() - began > self._config.start_timeout_s and not self._roster.is_loading:
                raise UserError(
                    f"executor=ray: {self._least - len(self._roster.ready)} more workers are needed and found no room "
                    f"in executor.start_timeout_s={self._config.start_timeout_s:g}: {self._fleet.describe()}"
                )
            for _ in self._listen():
                pass
        return self.report()

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> bool:
        self._extensions.append((shapes, texts))
        self._report.pop("phases", None)
        for member in list(self._roster.ready.values()):
            self._roster.begin(member, State.loading)
            member.extended = len(self._extensions)
            self._fleet.extend(member.id, shapes, texts)
        while not self._roster.ready:
            self._hire()
            for _ in self._listen():
                pass
        return True

    def write_with(self, sink: Sink | None) -> None:
        self._sink = sink
        for member in self._roster:
            member.equipped = False
        if sink is not None:  # once in each run, before its first batch
            self._roster.start_clocks()

    def report(self) -> dict[str, Any]:
        recovery = {"recovery": list(self._events.recovery)} if self._events.recovery else {}
        workers = {"workers": self._roster.figures()}
        return {**self._report, **recovery, "executor": {**self._events.to_dict(), **workers}}

    def close(self) -> None:
        self._roster.clear()
        self._fleet.close()

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        self._queue = BatchQueue(iter(batches), 1)
        try:
            yield from self._run()
        finally:
            self._queue = BatchQueue(iter(()), 1)
            if self._roster.flights:  # abandoned half-way: their results must not turn up in the next run
                self.close()

    def _run(self) -> Iterator[BatchResult]:
        while True:
            if self._stop:
                self._queue.drop()
            self._hire()
            self._feed()
            if not self._roster.flights and self._queue.is_empty:
                return
            yield from self._listen()

    def _hire(self) -> None:
        """Ask for workers while there is room and work for them."""
        if time.monotonic() < self._no_hire_before or self._stop:
            return
        bounds = self._config.bounds
        wanted = bounds[1] if bounds else self._fleet.places()
        if self._report:  # before the first is ready nobody knows how much work there is
            self._queue.window = max(1, READ_AHEAD * wanted)
            wanted = min(wanted, self._roster.busy + len(self._queue))
        while len(self._roster) < max(wanted, self._least):
            self._fleet.hire(self._roster.add().id)
            self._most = max(self._most, len(self._roster))

    def _feed(self) -> None:
        """Give every worker that has nothing to draw a batch, then every one a second."""
        for depth in range(1, BATCHES_AHEAD + 1):
            if self._queue.is_empty:
                return
            for member in list(self._roster.hungry.values()):
                if member.is_due and not member.flights:
                    self._replace(member)
                elif len(member.flights) < depth and not member.is_due:
                    self._give(member)

    def _give(self, member: Member) -> None:
        if self._blame.must_wait(member.flights.values(), self._queue.peek()):
            return
        # With little left it goes to workers that have nothing, rather than behind another batch.
        if member.flights and len(self._queue) <= len(self._roster.idle):
            return
        batch = self._queue.take(member.shape, self._roster.shapes)
        if batch is None:
            return
        if not member.equipped:
            writes = self._config.writes
            sink = self._sink if writes is Writes.worker or (writes is Writes.auto and member.is_elsewhere) else None
            self._fleet.equip(member.id, sink, must=writes is Writes.worker)
            member.equipped = True
        self._ticket += 1
        self._roster.take_off(member, self._ticket, Flight.of(batch))
        self._fleet.draw(member.id, self._ticket, batch)

    def _listen(self) -> Iterator[BatchResult]:
        """Handle what has happened meanwhile."""
        notices = self._fleet.poll(POLL_S)
        # Before anything is handed on: whoever takes the results may take long.
        late = self._late({notice.worker for notice in notices})
        for notice in notices:
            yield from self._handle(notice)
        for member, limit in late:
            if member.id in self._roster:
                self._fleet.fire(member.id)
                started = frozenset([next(iter(member.flights), 0)])
                how = f"gave no sign of life for {limit:g} s and was killed"
                yield from self._bury(member, Died(how=how, started=started))

    def _late(self, heard_of: set[int]) -> list[tuple[Member, float]]:
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + POLL_S
        limits = ((m, m.limit(self._config)) for m in self._roster if m.id not in heard_of)
        return [(m, limit) for m, limit in limits if limit is not None and now - m.since > limit]

    def _handle(self, notice: Notice) -> Iterator[BatchResult]:
        member = self._roster.get(notice.worker)
        if member is None:  # it was fired meanwhile
            return
        event: Event = notice.fetch()
        match event:
            case Hired():
                member.node, member.is_elsewhere = event.node, event.is_elsewhere
                self._roster.begin(member, State.loading)
                self._fleet.load(member.id)
            case Ready():
                self._welcome(member, event.report)
            case Refused():
                if not self._report:
                    raise UserError(event.message)
                raise RunStopped(f"{member} cannot start: {event.message}")
            case Stopped():
                raise RunStopped(f"{member}: {event.message}")
            case Done():
                yield from self._land(member, event)
            case Died():
                if event.broken and not self._report:
                    raise RunStopped(f"the first worker cannot start: it {event.how}")
                yield from self._bury(member, event)

    def _welcome(self, member: Member, report: dict[str, Any]) -> None:
        before = self._report.get("numerics")
        if before is not None and report.get("numerics") != before:
            raise RunStopped(
                f"a worker on {member.node} computes with {report.get('numerics')}, the first one with {before}: "
                "let workers run on machines of one kind (executor.resources), or resume there"
            )
        if member.extended < len(self._extensions):
            shapes, texts = self._extensions[member.extended]
            member.extended += 1
            self._roster.begin(member, State.loading)
            self._fleet.extend(member.id, shapes, texts)
            return
        self._report = merged(self._report, report)
        self._roster.begin(member, State.ready)
        if self._due_gb is not None and member.is_larger_than(self._due_gb, report):
            log.warning(
                "memory.health.max_reserved_gb=%g is less than what a fresh worker has reserved: "
                "none will be replaced for that",
                self._due_gb,
            )
            self._due_gb = None
        log.info("%s is ready", member)

    def _land(self, member: Member, done: Done) -> Iterator[BatchResult]:
        """Hand on the results of a batch."""
        flight = self._roster.land(member, done.ticket, done.seconds)
        self._deaths_in_a_row = 0
        self._no_hire_before = 0.0
        self._events.recovery += done.steps
        self._report = merged(self._report, done.report)
        most = self._config.max_items_per_worker
        member.is_due = (most is not None and member.images >= most) or (
            self._due_gb is not None and member.is_larger_than(self._due_gb, done.report)
        )
        parts = done.parts
        done = Done(ticket=done.ticket, parts=[], report={}, seconds=0.0)
        while parts:
            part = parts.pop(0)  # its pixels are given away
            items = [flight.missing.pop(p) for p in part.positions]
            images = ReadyImages(part.pixels) if part.pixels is not None else None
            error = part.error
            if part.bad_picture:
                images, error = BrokenImages(error or "bad picture"), None
            yield BatchResult(
                items=items,
                images=images,
                written=part.written,
                error=error,
                details=part.details,
                attempt=flight.batch.attempt,
            )

    def _replace(self, member: Member) -> None:
        log.info("replacing %s after %d pictures", member, member.images)
        self._fleet.fire(member.id)
        self._roster.remove(member)
        self._events.recycled += 1

    def _bury(self, member: Member, death: Died) -> Iterator[BatchResult]:
        """Queue again what the dead worker had; give up the items that have now taken two with them.

        Raises RunStopped after too many deaths in a row.
        """
        flights = self._roster.remove(member, died=True)
        for ticket, flight in flights.items():
            flight.started = ticket in death.started
        if death.blameless:
            again, given_up = self._blame.acquit(flights.values()), []
        else:
            again, given_up = self._blame.judge(list(flights.values()))
        self._queue.give_back(again)
        for batch in given_up:
            self._events.quarantined.append(batch.items[0].item_dir)
            yield BatchResult(items=batch.items, error=given_up_text(death.how), attempt=batch.attempt)
        self._events.deaths.append(f"{member} {death.how}")
        log.warning("%s %s", member, death.how)
        self._deaths_in_a_row += 1
        limit = (self._config.max_restarts + 1) * max(1, self._most)  # a node takes all of its workers with it
        if self._deaths_in_a_row >= limit:
            raise RunStopped(
                f"{self._deaths_in_a_row} workers died one after the other without drawing a picture; "
                f"the last one {death.how}"
            )
        pause = min(LONGEST_PAUSE_S, self._config.backoff_s * 2 ** (self._deaths_in_a_row - 2))
        self._no_hire_before = time.monotonic() + (pause if self._deaths_in_a_row > 1 else 0.0)
