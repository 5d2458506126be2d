"""The workers that the pool of ``executor=ray`` has, and what each has done."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zimage_runner.executors.blame import Flight
from zimage_runner.executors.worker_events import reserved_gb

if TYPE_CHECKING:
    from zimage_runner.executors.ray_options import RayOptions
    from zimage_runner.plan.items import Bucket

BATCHES_AHEAD = 2
"""For each worker: one being drawn and one waiting, so that it never waits for the driver."""
LISTED = 200
"""Workers whose figures are told."""


class State(enum.Enum):
    """Where a worker stands."""

    waiting = "waiting"
    """For a place on a node."""
    loading = "loading"
    ready = "ready"


class Member:
    """One worker, from being asked for until it ends."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.node = ""
        """Its name, once the worker has a place there."""
        self.is_elsewhere = False
        """Whether it is on another machine."""
        self.state = State.waiting
        self.since = time.monotonic()
        """When it was last heard of, or given its present task."""
        self.flights: dict[int, Flight] = {}
        """Ticket -> batch, in the order of their drawing."""
        self.shape: Bucket | None = None
        """Of its last batch."""
        self.equipped = False
        """Whether it knows who writes in this run."""
        self.extended = 0
        """Further jobs that it is ready for."""
        self.is_due = False
        """Whether it is to be replaced before its next batch."""
        self.images = 0

    def __str__(self) -> str:
        return f"worker {self.id} on {self.node}" if self.node else f"worker {self.id}"

    def limit(self, config: RayOptions) -> float | None:
        """Seconds that its present task may take; None for no limit."""
        if self.state is State.loading:
            return config.start_timeout_s
        if self.state is State.ready and self.flights:
            return config.item_timeout_s * max(1, len(next(iter(self.flights.values())).batch.items))
        return None

    def is_larger_than(self, limit_gb: float, report: dict[str, Any]) -> bool:
        """Whether it has reserved more GPU memory than this."""
        return reserved_gb(report) > limit_gb


class Roster:
    """All living workers by number, sorted by what can be done with them, and figures of all that ever lived."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._number = 0
        self._figures: dict[int, dict[str, Any]] = {}
        self._ready_since: dict[int, float] = {}
        self._began = time.monotonic()
        """When these workers were first asked for, or a later run with them began."""
        self.flights = 0
        """Batches that workers have."""
        self.ready: dict[int, Member] = {}
        """Workers that can draw."""
        self.hungry: dict[int, Member] = {}
        """Of these, those that another batch may be given to."""
        self.idle: dict[int, Member] = {}
        """Of these, those that have nothing to draw."""
        self.shapes: Counter[Bucket] = Counter()
        """How many workers drew each shape last."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __contains__(self, number: int) -> bool:
        return number in self._members

    def get(self, number: int) -> Member | None:
        """Return a worker that lives."""
        return self._members.get(number)

    @property
    def busy(self) -> int:
        """How many workers have something to draw."""
        return len(self.ready) - len(self.idle)

    @property
    def is_loading(self) -> bool:
        """Whether some worker will be ready soon."""
        return any(m.state is State.loading for m in self._members.values())

    def add(self) -> Member:
        """Return a new worker, which waits for a place."""
        self._number += 1
        member = self._members[self._number] = Member(self._number)
        return member

    def begin(self, member: Member, state: State) -> None:
        """Note what a worker does from now on."""
        member.state = state
        member.since = time.monotonic()
        if state is State.ready:
            self._ready_since.setdefault(member.id, member.since)
        self._sort(member)

    def remove(self, member: Member, *, died: bool = False) -> dict[int, Flight]:
        """Forget a worker. Return what it had."""
        del self._members[member.id]
        for group in (self.ready, self.hungry, self.idle):
            group.pop(member.id, None)
        if member.shape is not None:
            self.shapes[member.shape] -= 1
        self._figure(member)["died"] = died
        self._stop_clock(member)
        self.flights -= len(member.flights)
        return member.flights

    def take_off(self, member: Member, ticket: int, flight: Flight) -> None:
        """Note that a worker has a batch."""
        if not member.flights:
            member.since = time.monotonic()
        member.flights[ticket] = flight
        bucket = flight.batch.items[0].bucket
        if bucket is not member.shape:
            if member.shape is not None:
                self.shapes[member.shape] -= 1
            self.shapes[bucket] += 1
            member.shape = bucket
        self.flights += 1
        self._sort(member)

    def land(self, member: Member, ticket: int, seconds: float) -> Flight:
        """Note that a worker has drawn a batch, in this time. Return it."""
        flight = member.flights.pop(ticket)
        self.flights -= 1
        member.since = time.monotonic()
        member.images += len(flight.missing)
        figure = self._figure(member)
        figure["images"] += len(flight.missing)
        figure["busy_seconds"] += seconds
        if figure["first_image"] is None:
            figure["first_image"] = round(member.since - self._began, 3)
        self._sort(member)
        return flight

    def _sort(self, member: Member) -> None:
        is_ready = member.state is State.ready
        for group, belongs in (
            (self.ready, is_ready),
            (self.hungry, is_ready and len(member.flights) < BATCHES_AHEAD),
            (self.idle, is_ready and not member.flights),
        ):
            if belongs:
                group.setdefault(member.id, member)
            else:
                group.pop(member.id, None)

    def start_clocks(self) -> None:
        """A run begins: its figures start from nothing, and workers that are ready could draw from now on."""
        self._figures.clear()
        self._began = time.monotonic()
        for member in self.ready.values():
            self._ready_since[member.id] = time.monotonic()

    def _figure(self, member: Member) -> dict[str, Any]:
        empty = {
            "worker": "", "images": 0, "first_image": None, "busy_seconds": 0.0, "ready_seconds": 0.0, "died": False,
        }  # fmt: skip
        figure = self._figures.setdefault(member.id, empty)
        figure["worker"] = str(member)
        return figure

    def _stop_clock(self, member: Member) -> None:
        since = self._ready_since.pop(member.id, None)
        if since is not None:
            self._figure(member)["ready_seconds"] += time.monotonic() - since

    def figures(self) -> list[dict[str, Any]]:
        """Return for each worker: pictures, seconds to its first batch of them since the run began or the workers
        were asked for, pictures a second while it drew, share of its time without work, whether it died."""
        found = []
        for number, figure in list(self._figures.items())[:LISTED]:
            since = self._ready_since.get(number)
            ready = figure["ready_seconds"] + (time.monotonic() - since if since is not None else 0.0)
            busy = figure["busy_seconds"]
            found.append(
                {
                    "worker": figure["worker"],
                    "images": figure["images"],
                    "first_image_seconds": figure["first_image"],
                    "images_per_second": round(figure["images"] / busy, 3) if busy else 0.0,
                    "idle_share": round(max(0.0, 1 - busy / ready), 3) if ready else 0.0,
                    "died": figure["died"],
                }
            )
        return found

    def clear(self) -> None:
        """Forget all living workers; the figures stay."""
        for member in self:
            self.remove(member)
