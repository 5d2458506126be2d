"""Executors that outlive their job, so that all jobs of a multirun that need the same session share it.

The end of such a job comes late: while the GPU draws its last pictures the next job is composed and planned, and when
the GPU has work of that one the pictures are waited for, written and reported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from zimage_runner.executors.base import Executor
from zimage_runner.exit_codes import Later
from zimage_runner.runner.job import Job
from zimage_runner.session import Session
from zimage_runner.signals import StopRequest


class Executors:
    """Starts the executor of each job, or hands over the last job's when it fits. One at a time is kept."""

    def __init__(self, stop: StopRequest, *, overlaps: bool = False) -> None:
        """``overlaps``: a job may end while the next one draws."""
        self.stop = stop
        """One for all jobs: a signal ends the whole sweep."""
        self.memo: dict[str, Any] = {}
        """What ``prepare`` need not find out again for the next job."""
        self._overlaps = overlaps
        self._executor: Executor | None = None
        self._key = ""
        self._unfinished: tuple[Callable[[], int], Later] | None = None
        self.job_label = ""
        """How the job at hand is called on the terminal; empty where it is the only one."""
        self.last_arrival = 0.0
        """time.perf_counter() when the last job's last picture was on the host."""

    @contextlib.contextmanager
    def lease(self, job: Job) -> Iterator[Executor]:
        """A started executor, warm for the job's shapes. After an error it is not used again."""
        key = executor_key(job)
        if key != self._key:
            self.close()  # the job that used it ends undisturbed
        try:
            with self.stop.interruptible():  # nothing is written yet: a refusal leaves no run directory behind
                executor = self._started(job, key)
            yield executor
        except BaseException:
            self.close()
            raise

    def _started(self, job: Job, key: str) -> Executor:
        if self._executor is not None and self._executor.extend(job.shapes, job.texts):
            return self._executor
        self.close()
        config = job.config
        self._executor = config.executor.create(
            functools.partial(Session, config.executor.adapt(job.session), job.shapes, job.texts),
            auto_batch=config.engine.auto_batch,
            health=config.memory.health,
            stop=self.stop,
        )
        self._key = key
        self._executor.start()
        return self._executor

    @property
    def is_behind(self) -> bool:
        """Whether a job's end is still to come."""
        return self._unfinished is not None

    def conclude(self, executor: Executor, end: Callable[[], int]) -> int | Later:
        """End a job that the executor has all the work of: now, or later where the next job may begin meanwhile.

        ``end`` waits for what is on its way, and returns the exit code; it keeps its errors to itself.
        """
        self.catch_up()
        if not (self._overlaps and executor.overlaps):
            return end()
        later = Later()
        self._unfinished = (end, later)
        return later

    def catch_up(self) -> None:
        """End the job whose end is still to come, if there is one. Also called before anything is said of the next."""
        if self._unfinished is not None:
            (end, later), self._unfinished = self._unfinished, None
            later.tell(end())

    def close(self) -> None:
        """End the session, if there is one, and before it the job whose end is still to come."""
        self.catch_up()
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()


def executor_key(job: Job) -> str:
    """Equal keys mean that one executor serves both jobs."""
    return repr(
        (job.session.key(), type(job.config.executor).__name__, job.config.executor, job.config.engine.auto_batch)
    )


_shared: Executors | None = None


@contextlib.contextmanager
def shared_executors(stop: StopRequest, *, overlaps: bool = False) -> Iterator[Executors]:
    """While this is open, every run of this process takes its executor from one place and leaves it warm."""
    global _shared
    _shared = Executors(stop, overlaps=overlaps)
    try:
        yield _shared
    finally:
        executors, _shared = _shared, None
        executors.close()


def current_executors() -> Executors | None:
    """What ``shared_executors`` opened, if anything."""
    return _shared
