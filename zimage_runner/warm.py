"""Executors that outlive their job, so that all jobs of a multirun that need the same session share it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from zimage_runner.executors.base import Executor
from zimage_runner.job import Job
from zimage_runner.session import Session
from zimage_runner.signals import StopRequest


class Executors:
    """Starts the executor of each job, or hands over the last job's when it fits. One at a time is kept."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        """One for all jobs: a signal ends the whole sweep."""
        self.memo: dict[str, Any] = {}
        """What ``prepare`` need not find out again for the next job."""
        self._executor: Executor | None = None
        self._key = ""

    @contextlib.contextmanager
    def lease(self, job: Job) -> Iterator[Executor]:
        """A started executor, warm for the job's shapes. After an error it is not used again."""
        try:
            with self.stop.interruptible():  # nothing is written yet: a refusal leaves no run directory behind
                executor = self._started(job)
            yield executor
        except BaseException:
            self.close()
            raise

    def _started(self, job: Job) -> Executor:
        key = executor_key(job)
        if self._executor is not None and self._key == key and self._executor.extend(job.shapes, job.texts):
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

    def close(self) -> None:
        """End the session, if there is one."""
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
def shared_executors(stop: StopRequest) -> Iterator[Executors]:
    """While this is open, every run of this process takes its executor from one place and leaves it warm."""
    global _shared
    _shared = Executors(stop)
    try:
        yield _shared
    finally:
        executors, _shared = _shared, None
        executors.close()


def current_executors() -> Executors | None:
    """What ``shared_executors`` opened, if anything."""
    return _shared
