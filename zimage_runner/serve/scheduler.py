"""Who draws next: one thread owns the model, and takes batches from requests and from the run in turns.

A request is a few pictures that a client waits for; the run is a long plan that waits in its own thread. Where both
wait they alternate, so that a request's first picture comes at most one batch of the run late, and a run goes on under
any number of requests. Requests take turns picture by picture, and pictures of equal shape are drawn together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from zimage_runner.errors import RunStopped, UserError, error_text
from zimage_runner.executors.base import Batch, BatchResult, Executor
from zimage_runner.serve.turns import Turns, WaitedOnce

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

MAX_TRIES = 2
"""Sessions that a request's picture may lose before the request is given up."""
MAX_STARTS = 5
"""Sessions in a row that may fail to start before the service gives up."""
WHILE_LOADING_S = 2.0
"""How long the end waits for a model that is not ready: there is nothing to lose."""
LOOK_S = 1.0
"""How often an idle model is looked at: whether its process is still there."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class Full(Exception):
    """No place in the queue."""


@dataclass(eq=False, slots=True)
class Place:
    """One picture of a request in the queue."""

    item: WorkItem
    attempt: int = 1
    """Above 1 when it came out bad before."""
    tries: int = 0
    """Sessions that were lost with it."""


class Order(Protocol):
    """A request's pictures as the scheduler sees them. Its methods are called from the drawing thread."""

    waiting: deque[Place]
    """What is not drawn yet. The scheduler's to change."""

    def begin(self) -> None:
        """One of its pictures is about to be drawn."""
        ...

    def take(self, result: BatchResult, position: int) -> None:
        """Take the picture at ``position`` of a result, or its error."""
        ...

    def fail(self, error: str) -> None:
        """No further picture comes: the model is lost."""
        ...


class Scheduler:
    """Keeps a warm executor busy. ``start`` it, then ``submit`` from any thread."""

    def __init__(
        self,
        make_executor: Callable[[], Executor],
        *,
        most_waiting: int,
        largest_batch: int,
        on_overdue: Callable[[str], None],
    ) -> None:
        """``most_waiting``: pictures of requests that may wait. ``largest_batch``: pictures drawn together.

        ``on_overdue`` hears, from another thread, that the model hangs and cannot be given up, and why.
        """
        self._make_executor = make_executor
        self._on_overdue = on_overdue
        self._most_waiting = most_waiting
        self._largest_batch = largest_batch
        self._changed = threading.Condition()
        self._orders: deque[Order] = deque()
        self._run_batches: deque[tuple[Batch, Turns]] = deque()
        self._runs_turn = False
        self._flying: dict[int, tuple[Order | Turns, Place]] = {}
        """What is being drawn, by the item's identity, and whose it is."""
        self._closing = False
        self._report: dict[str, Any] = {}
        self.ready = threading.Event()
        """Loaded, warm and able to draw."""
        self.trouble: str | None = None
        """Why there is no model, while there is none."""
        self.gave_up = threading.Event()
        """No model could be started, again and again."""
        self.refused = False
        """The first model could not be started for something that the user can mend."""
        self.seconds_per_picture = 0.0
        """Of the last pictures; 0 until the first."""
        self.drawn = 0
        """Pictures since the start, of requests and runs."""
        self.restarts = 0
        """Sessions that were lost and started anew by this class; an executor replaces its worker by itself."""
        self._thread = threading.Thread(target=self._live, name="drawing", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def close(self, patience_s: float) -> bool:
        """Finish the batch that is being drawn, and end the model. What waits is failed.

        Returns False when that was not done in time: a model that is being loaded, or hangs, cannot be interrupted.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(patience_s if self.ready.is_set() else min(patience_s, WHILE_LOADING_S))
        return not self._thread.is_alive()

    def report(self) -> dict[str, Any]:
        """Return the session's report after the last batch."""
        return self._report

    @property
    def waiting(self) -> int:
        """Pictures of requests that are not being drawn yet."""
        with self._changed:
            return self._count()

    @property
    def seconds_to_wait(self) -> float:
        """About how long a picture that comes now waits."""
        return max(1.0, self.waiting * self.seconds_per_picture)

    def submit(self, order: Order) -> None:
        """Queue a request's pictures, all or none. Raises Full, RunStopped."""
        with self._changed:
            if self._closing or self.gave_up.is_set():
                raise RunStopped(self.trouble or "the service is ending")
            if self._count() + len(order.waiting) > self._most_waiting:
                raise Full
            self._orders.append(order)
            self._changed.notify_all()

    def submit_again(self, order: Order, place: Place) -> None:
        """Put a picture that came out bad before all others. Raises RunStopped."""
        with self._changed:
            if self._closing or self.gave_up.is_set():
                raise RunStopped(self.trouble or "the service is ending")
            order.waiting.appendleft(place)
            if order not in self._orders:
                self._orders.appendleft(order)
            self._changed.notify_all()

    def cancel(self, order: Order) -> None:
        """Free the places of a request's pictures that wait; what is being drawn is thrown away."""
        with self._changed:
            order.waiting.clear()
            with contextlib.suppress(ValueError):
                self._orders.remove(order)

    def add_run_batch(self, batch: Batch, turns: Turns) -> None:
        """Queue a batch of the run. Called by ``Turns``."""
        with self._changed:
            if self._closing or self.gave_up.is_set():
                raise RunStopped(self.trouble or "the service is ending")
            self._run_batches.append((batch, turns))
            self._changed.notify_all()

    def drop_run_batches(self, turns: Turns) -> None:
        """Forget what a run has queued."""
        with self._changed:
            self._run_batches = deque(entry for entry in self._run_batches if entry[1] is not turns)

    def _count(self) -> int:
        return sum(len(order.waiting) for order in self._orders)

    def _live(self) -> None:
        """The drawing thread: worker processes die with the thread that started them, so there is one for all time."""
        failures = 0
        while not self._closing:
            executor: Executor | None = None
            try:
                executor = self._make_executor()
                executor.batches_ahead = 1
                executor.on_overdue = lambda items, reason: self._on_overdue(reason)
                self._report = executor.start()
                self.trouble = None
                self.ready.set()
                for result in executor.run(self._batches(executor)):
                    failures = 0
                    self._deliver(result)
                    self._report = executor.report()
            except Exception as error:  # whatever it is, the requests are answered and the model is started again
                started = self.ready.is_set()
                self.ready.clear()
                failures += 1
                self._lose(error, started)
                if failures > MAX_STARTS or not (started or self.restarts):
                    self.refused = isinstance(error, UserError) and not self.restarts
                    self.gave_up.set()
                    break
                self.restarts += 1
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1))
                    )
            finally:
                with contextlib.suppress(Exception):
                    if executor is not None:
                        executor.close()
        self.ready.clear()
        self._end()

    def _batches(self, executor: Executor) -> Iterator[Batch]:
        """Yield what is next; waits while there is nothing. The executor asks once it has nothing else to do.

        A worker that dies meanwhile is replaced at once: nobody would send a request to a service that is not ready.
        """
        while True:
            batch = None
            with self._changed:
                if self._changed.wait_for(lambda: self._closing or self._orders or self._run_batches, LOOK_S):
                    if self._closing:
                        return
                    batch = self._next()
                    self._asked = time.perf_counter()
            if batch is not None:
                yield batch
            elif executor.is_lost:
                self.ready.clear()
                executor.recover()
                self._report = executor.report()
                self.ready.set()

    def _next(self) -> Batch:
        if self._run_batches and (self._runs_turn or not self._orders):
            self._runs_turn = False
            batch, turns = self._run_batches.popleft()
            self._flying |= {id(item): (turns, Place(item)) for item in batch.items}
            return batch
        self._runs_turn = True
        return self._batch_of_orders()

    def _batch_of_orders(self) -> Batch:
        """A picture of the first request, and pictures of equal shape of all; then it is the next request's turn."""
        first = self._orders[0].waiting[0]
        chosen: list[Place] = []
        for order in self._orders:
            for place in list(order.waiting):
                if len(chosen) == self._largest_batch:
                    break
                if place.attempt == first.attempt and place.item.bucket == first.item.bucket:
                    order.waiting.remove(place)
                    chosen.append(place)
                    self._flying[id(place.item)] = (order, place)
                    order.begin()
        self._orders.rotate(-1)
        self._orders = deque(order for order in self._orders if order.waiting)
        return Batch(items=[place.item for place in chosen], attempt=first.attempt)

    def _deliver(self, result: BatchResult) -> None:
        now = time.perf_counter()
        each, self._asked = (now - self._asked) / len(result.items), now
        self.seconds_per_picture = each if not self.drawn else 0.8 * self.seconds_per_picture + 0.2 * each
        self.drawn += len(result.items)
        with self._changed:
            owners = [self._flying.pop(id(item))[0] for item in result.items]
        if isinstance(owners[0], Turns):  # a batch of the run is the run's alone
            owners[0].results.put(result)
            return
        if result.images is not None:
            result = replace(result, images=WaitedOnce(result.images))
        for position, owner in enumerate(owners):
            assert not isinstance(owner, Turns)
            owner.take(result, position)

    def _lose(self, error: Exception, started: bool) -> None:
        """The model is gone: requests are tried once more with the next one, the run's thread is told."""
        self.trouble = str(error) if isinstance(error, RunStopped | UserError) else error_text(error)
        foreseen = isinstance(error, RunStopped | UserError)
        what = "was lost" if started else "cannot be started"
        log.error("the model %s: %s", what, self.trouble, exc_info=None if foreseen else error)
        with self._changed:
            flying, self._flying = list(self._flying.values()), {}
            turns = {owner for owner, _ in flying if isinstance(owner, Turns)} | {t for _, t in self._run_batches}
            self._run_batches.clear()
            given_up = []
            for owner, place in reversed(flying):
                if isinstance(owner, Turns):
                    continue
                place.tries += 1
                if place.tries >= MAX_TRIES:
                    given_up.append(owner)
                    continue
                owner.waiting.appendleft(place)
                if owner not in self._orders:
                    self._orders.appendleft(owner)
        for owner in given_up:
            self.cancel(owner)
            owner.fail(f"the model was lost while this was drawn: {self.trouble}")
        for run in turns:
            run.results.put(RunStopped(f"the model was lost: {self.trouble}"))

    def _end(self) -> None:
        """Answer whatever still waits."""
        with self._changed:
            self._closing = True
            orders, self._orders = list(self._orders), deque()
            turns = {turns for _, turns in self._run_batches}
            self._run_batches.clear()
        for order in orders:
            order.fail(self.trouble or "the service is ending")
        for run in turns:
            run.results.put(RunStopped(self.trouble or "the service is ending"))
