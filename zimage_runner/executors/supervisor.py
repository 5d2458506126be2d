"""Keeps one worker process running: starts, replaces and ends it, and remembers what happened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import RunStopped, UserError, counted
from zimage_runner.executors.child import Child, WorkerBroken, WorkerDied
from zimage_runner.executors.messages import Extend, Start
from zimage_runner.executors.worker_events import WorkerEvents, merged, reserved_gb
from zimage_runner.memory.policies import Action, Health
from zimage_runner.plan import Encoding
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.executors.process import ProcessExecutorConfig
    from zimage_runner.warmup import WarmupShape

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 60.0


class Supervisor:
    """One worker at a time. Used from one thread, which must live as long as the worker (it dies with it)."""

    def __init__(self, config: ProcessExecutorConfig, start: Start, health: Health, stop: StopRequest) -> None:
        self.events = WorkerEvents("process")
        self.stop = stop
        self._config = config
        self._start = start
        self._health = health
        self._replaces_large = health.action is Action.recycle
        self._child: Child | None = None
        self._extensions: list[Extend] = []
        self._report: dict[str, Any] = {}
        self._deaths_in_a_row = 0
        self._items_drawn = 0

    @property
    def child(self) -> Child:
        """The living worker; a new one after ``bury``."""
        if self._child is None:
            self._spawn()
        assert self._child is not None
        return self._child

    def report(self) -> dict[str, Any]:
        """The worker's last report with the story of all of them."""
        recovery = {"recovery": list(self.events.recovery)} if self.events.recovery else {}
        return {**self._report, **recovery, "executor": self.events.to_dict()}

    def update(self, report: dict[str, Any]) -> None:
        """Take over a worker's report; the phases stay those of the first one, and peaks those of all."""
        self._report = merged(self._report, report)

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> None:
        """Get the worker, and every later one, ready for another job. The phases then tell of this job."""
        extension = Extend(shapes, texts)
        self._extensions.append(extension)
        try:
            report = self._extend(self.child, extension)
        except WorkerDied as death:
            self.bury(death)
            self._spawn()
        else:
            self._report.pop("phases", None)
            self.update(report)

    def drew(self, items: int) -> None:
        """The worker is of use."""
        self._deaths_in_a_row = 0
        self._items_drawn += items

    def bury(self, death: WorkerDied) -> None:
        """Record the death. Raises RunStopped after too many in a row."""
        self._child = None
        self.events.deaths.append(str(death))
        self._deaths_in_a_row += 1
        log.warning("the worker process %s", death)
        if self._deaths_in_a_row > self._config.max_restarts:
            deaths = counted(self._deaths_in_a_row, "worker process", "worker processes")
            raise RunStopped(f"{deaths} died one after the other without drawing a picture; the last one {death}")

    @property
    def is_lost(self) -> bool:
        """Whether the worker has died and nobody has taken notice yet."""
        return self._child is not None and self._child.has_ended

    def recover(self) -> None:
        """Replace a worker that ``is_lost``. Raises as ``bury`` and RunStopped."""
        try:
            while True:  # what it said before
                self.child.receive(0.0, 0.0)
        except WorkerDied as death:
            self.bury(death)
        self._spawn()

    @property
    def is_due(self) -> bool:
        """Whether the worker should be replaced before its next item."""
        most, limit = self._config.max_items_per_worker, self._health.max_reserved_gb
        if most is not None and self._items_drawn >= most:
            return True
        return self._replaces_large and limit is not None and self._reserved_gb > limit

    def recycle(self) -> None:
        """Replace an idle worker by a fresh one."""
        drawn = counted(self._items_drawn, "item")
        log.info("replacing the worker process after %s, %.1f GB reserved", drawn, self._reserved_gb)
        self.close()
        self.events.recycled += 1
        self._spawn()

    def close(self) -> None:
        """End the worker. Harmless when there is none."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _spawn(self) -> None:
        """Start a worker, again and again if need be. Raises RunStopped, or UserError from the first one."""
        while self._child is None:
            pause = min(LONGEST_PAUSE_S, self._config.backoff_s * 2 ** (self._deaths_in_a_row - 2))
            if self._deaths_in_a_row > 1 and self.stop.wait(pause):
                raise RunStopped("the run was asked to end while its worker process was being replaced")
            try:
                self._child = Child()
                report = self._load(self._child)
            except OSError as error:  # no process, no memory, no descriptor
                self._refused(error)
            except WorkerDied as death:
                if isinstance(death, WorkerBroken) and not self._report:
                    raise RunStopped(f"the worker process cannot start: it {death}") from None
                self.bury(death)
            except UserError as error:
                if not self._report:
                    raise
                raise RunStopped(f"the worker process cannot be replaced: {error}") from None
            else:
                self._welcome(self._child, report)

    def _refused(self, error: OSError) -> None:
        """The system starts no process. Raises UserError before the first picture; later it may be better soon."""
        if not self._report:
            raise UserError(
                f"executor=process: the worker process cannot be started ({error.strerror or error}): raise the "
                "limit of processes (ulimit -u) or of memory, or use executor=inline"
            ) from None
        self.bury(WorkerDied(f"cannot be started ({error.strerror or error})"))

    def _load(self, child: Child) -> dict[str, Any]:
        report = child.start(self._start, self._config.start_timeout_s)
        for extension in self._extensions:
            report = self._extend(child, extension)
        return report

    def _extend(self, child: Child, extension: Extend) -> dict[str, Any]:
        child.send(extension)
        return child.wait_ready(self._config.start_timeout_s)

    def _welcome(self, child: Child, report: dict[str, Any]) -> None:
        before = self._report.get("numerics")
        if before is not None and report.get("numerics") != before:
            # For instance a GPU that vanished: its pictures would differ, and come slowly.
            raise RunStopped(f"the new worker process computes with {report['numerics']}, the first one with {before}")
        self._items_drawn = 0
        self.update(report)
        limit = self._health.max_reserved_gb
        if self._replaces_large and limit is not None and self._reserved_gb > limit:
            self._replaces_large = False  # or it would be replaced for ever
            log.warning(
                "memory.health.max_reserved_gb=%g is less than what a fresh worker process has reserved (%.1f GB): "
                "it will not be replaced for that",
                limit,
                self._reserved_gb,
            )
        log.info("worker process %d is ready", child.pid)

    @property
    def _reserved_gb(self) -> float:
        return reserved_gb(self._report)
