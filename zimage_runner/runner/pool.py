"""One executor for all runs of a process, and the overlapped end of a multirun's runs.

The executor stays warm for the next run as long as both need the same session. Within a multirun a run may end late:
while the GPU draws its last images the next run is composed and planned. Once the GPU has work of that one, the images
are waited for, written and reported. Until then the run's exit code is a future. All of that is in this file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from zimage_runner.executors.base import Batch, BatchResult, Executor, Sink
from zimage_runner.executors.watchdog import OnOverdue
from zimage_runner.logs import say
from zimage_runner.outputs.writer import ArrivalClock
from zimage_runner.runner.spec import RunSpec, executor_key
from zimage_runner.session import Session
from zimage_runner.signals import StopRequest, graceful_stop


class ExitCode(Future[int]):
    """The exit code of a run whose last images are still on their way. Hydra's callbacks may print it or pickle it."""

    def __repr__(self) -> str:
        return str(self.result()) if self.done() else "not known yet"

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (repr(self),)


class SharedExecutor:
    """Starts the executor of each run, or hands over the last run's when it fits. One at a time is kept."""

    def __init__(self, stop: StopRequest, *, overlaps: bool = False, kept: Kept | None = None) -> None:
        """``overlaps``: a run may end while the next one draws. ``kept``: has the executor before and after."""
        self.stop = stop
        """One for all runs: a signal ends the whole multirun."""
        self.memo: dict[str, Any] = {}
        """What ``plan_run`` need not find out again for the next run."""
        self.label = ""
        """How the run at hand is called on the terminal; empty where it is the only one."""
        self.planned: list[int] = []
        """Pictures to be drawn of each run that was planned only (dry_run)."""
        self.arrivals = ArrivalClock()
        self._overlaps = overlaps
        self._kept = kept
        self._executor, self._key = (None, "") if kept is None else kept.take()
        self._is_spent = False
        """Whether the executor is in an unknown state and must not draw for another run."""
        self._unfinished: tuple[Callable[[], int], ExitCode] | None = None
        """How the previous run ends, and its exit code, while that end is still to come."""

    @contextlib.contextmanager
    def lease(self, spec: RunSpec) -> Iterator[Lease]:
        """Give a run its executor, started and warm for the run's shapes. After an error it is not used again."""
        key = executor_key(spec.config, spec.checkpoint)
        if key != self._key:
            if self._kept is not None and self._executor is not None:
                self._kept.tell_swap(spec)
            self.close()  # the run that used it ends undisturbed
        try:
            with self.stop.interruptible():  # nothing is written yet: a refusal leaves no run directory behind
                executor = self._started(spec, key)
            yield Lease(self, executor)
        except BaseException:
            self.close()
            raise

    def _started(self, spec: RunSpec, key: str) -> Executor:
        if self._executor is not None and not self._is_spent and self._executor.extend(spec.shapes, spec.texts):
            return self._executor
        self.close()
        self._is_spent = False
        config = spec.config
        self._executor = config.executor.create(
            functools.partial(Session, config.executor.adapt(spec.session), spec.shapes, spec.texts),
            auto_batch=config.engine.auto_batch,
            health=config.memory.health,
            stop=self.stop,
        )
        self._key = key
        if self._kept is not None:
            self._kept.name = spec.config.model.name
        self._executor.start()
        return self._executor

    def spend(self) -> None:
        """The next run gets another executor."""
        self._is_spent = True

    def finish(self, lease: Lease, report: Callable[[], int]) -> int | Future[int]:
        """End a run that the executor has all the work of. Return its exit code, or the future of it.

        It ends now, or later where the next run may begin meanwhile. ``report`` waits for what is on its way and
        returns the exit code; it keeps its errors to itself.
        """
        self.finish_previous()
        if not (self._overlaps and lease.overlaps):
            return report()
        code = ExitCode()
        self._unfinished = (report, code)
        return code

    def finish_previous(self) -> None:
        """End the previous run, if that is still to be done."""
        if self._unfinished is None:
            return
        (report, code), self._unfinished = self._unfinished, None
        try:
            code.set_result(report())
        except BaseException as error:
            code.set_exception(error)
            raise

    def let_go(self) -> None:
        """End the last run. The executor is kept where that is wanted and it can draw again; else it ends too."""
        self.finish_previous()
        if self._kept is not None and self._executor is not None and not self._is_spent:
            self._kept.put(self._executor, self._key)
            self._executor = None
        self.close()

    def close(self) -> None:
        """End the session, if there is one, and before it the run whose end is still to come."""
        self.finish_previous()
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()


class Kept:
    """The executor between the commands that a process does one after the other."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the model that was loaded last."""
        self.is_lost = False
        """Whether something went wrong after which this process should draw no more."""
        self._executor: Executor | None = None
        self._key = ""

    def take(self) -> tuple[Executor | None, str]:
        """Hand the executor and its key to a run. Unless it comes back, or was never there, it counts as lost."""
        executor, self._executor = self._executor, None
        self.is_lost = self.is_lost or executor is not None
        return executor, self._key

    def put(self, executor: Executor, key: str) -> None:
        """Have it back."""
        self._executor, self._key, self.is_lost = executor, key, False

    def lose(self) -> None:
        """Say that something went wrong."""
        self.is_lost = True

    def tell_swap(self, spec: RunSpec) -> None:
        """Say that another session takes this one's place."""
        new = spec.config.model.name
        what = f"{self.name} makes way for {new}" if new != self.name else f"{new} is loaded anew, for other settings"
        say(f"executor=resident: {what}")

    def close(self) -> None:
        """End the session."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()


class Lease:
    """The executor, while one run has it."""

    def __init__(self, owner: SharedExecutor, executor: Executor) -> None:
        self._owner = owner
        self._executor = executor
        self.overlaps = executor.overlaps
        self.stop = owner.stop
        self.label = owner.label
        self.arrivals = owner.arrivals

    def run(self, batches: Iterable[Batch], on_overdue: OnOverdue | None = None) -> Iterator[BatchResult]:
        """Return the results of every batch, as ``Executor.run`` does; ``on_overdue``: see there."""
        self._executor.on_overdue = on_overdue
        return self._executor.run(self._while_busy(batches))

    @property
    def has_workers_elsewhere(self) -> bool:
        """Whether pictures may be drawn on other machines."""
        return self._executor.has_workers_elsewhere

    def write_with(self, sink: Sink | None) -> None:
        """Offer a way to write pictures where they are drawn; None: no longer."""
        self._executor.write_with(sink)

    def end_after_run(self) -> None:
        """Draw for no other run with this executor: something unforeseen has happened in it."""
        self._owner.spend()

    def _while_busy(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches. When the executor has one and asks for more, there is time to end the previous run."""
        for batch in batches:
            yield batch
            self._owner.finish_previous()

    def report(self) -> dict[str, Any]:
        """Return the session's report as it is now."""
        return self._executor.report()


_shared: SharedExecutor | None = None
_kept: Kept | None = None


def keep_between_runs() -> Kept:
    """From now on the executor of one run, or multirun, stays warm for the next of this process."""
    global _kept
    _kept = Kept()
    return _kept


@contextlib.contextmanager
def shared_executor(stop: StopRequest, *, overlaps: bool = False) -> Iterator[SharedExecutor]:
    """Let every run of this process use one executor, and leave it warm for the next, until the block ends."""
    global _shared
    _shared = SharedExecutor(stop, overlaps=overlaps, kept=_kept)
    try:
        yield _shared
    finally:
        executor, _shared = _shared, None
        executor.let_go()


@contextlib.contextmanager
def lent(shared: SharedExecutor) -> Iterator[None]:
    """Let the runs of the block use an executor that another part of the program keeps."""
    global _shared
    _shared = shared
    try:
        yield
    finally:
        _shared = None


@contextlib.contextmanager
def executor_of_run() -> Iterator[SharedExecutor]:
    """Give a run the multirun's executor, or one of its own that is closed with it.

    After an error the previous run ends first: messages come in the order of the runs.
    """
    if _shared is None:
        with graceful_stop() as stop:
            own = SharedExecutor(stop, kept=_kept)
            try:
                yield own
            finally:
                own.let_go()
        return
    shared = _shared
    try:
        yield shared
    except Exception:
        shared.finish_previous()
        raise
