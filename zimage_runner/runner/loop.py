"""The loop itself: batches to the executor, pictures to the writer, and what came out bad once more."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from zimage_runner.executors.base import Batch, Executor
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.writer import Outcome, PictureJob, Writer
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.runner.job import Job
from zimage_runner.signals import StopRequest

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A picture that comes out bad (NaN, one single colour) is drawn once more before its item counts as failed."""


class Drawing:
    """Draws items and has them written to an open run directory: ``begin``, ``finish``, ``close``."""

    def __init__(
        self,
        job: Job,
        run_dir: RunDirectory,
        ledger: Ledger,
        fingerprints: Fingerprints,
        report: dict[str, Any],
        on_settled: Callable[[Outcome], None],
    ) -> None:
        """``report``: the session's, for the records. ``on_settled`` is told of each item that is done or failed."""
        self._job = job
        self._fingerprints = fingerprints
        self._report = report
        self._on_settled = on_settled
        self._again: list[tuple[WorkItem, str]] = []
        """Items whose picture was bad, and why."""
        output_file = job.config.output_file
        self._output_file = None if output_file is None else os.path.abspath(output_file)  # with hydra.job.chdir
        self._items: dict[str, WorkItem] = {}
        self._writer = Writer(run_dir, ledger, job.config.output, self._on_done)

    def begin(
        self, executor: Executor, batches: Iterable[Batch], stop: StopRequest, on_submitted: Callable[[], None]
    ) -> None:
        """Hand the batches to the executor and its pictures to the writer; ``on_submitted`` is called in between."""
        self._executor, self._stop = executor, stop
        self._writer.start_clock()
        self._submit(itertools.takewhile(lambda _: not stop, batches), 1, on_submitted)

    def not_before(self, instant: float) -> None:
        """The executor was busy with another run until then: the first picture's seconds count from there."""
        self._writer.not_before(instant)

    def finish(self) -> None:
        """Wait until all is written; what came out bad is drawn once more."""
        attempt = 1
        self._writer.flush()
        while self._again and not self._stop:
            again, self._again = self._again, []
            attempt += 1
            for item, error in again:
                log.warning("%s: %s, drawing it once more", item.item_dir, error)
            self._submit((Batch(items=[item], attempt=attempt) for item, _ in again), attempt)
            self._writer.flush()

    def close(self) -> None:
        """Write what is queued and end the writer. Raises DiskError if something could not be written."""
        self._writer.close()

    def _submit(self, batches: Iterable[Batch], attempt: int, on_submitted: Callable[[], None] | None = None) -> None:
        for result in self._executor.run(batches):
            jobs = [self._picture_job(item, {**result.details, "attempt": attempt}) for item in result.items]
            if result.images is not None:
                self._writer.submit(jobs, result.images)
            else:
                for picture in jobs:
                    self._writer.fail(picture, result.error or "unknown error")
            if on_submitted is not None:
                on_submitted()

    def _picture_job(self, item: WorkItem, details: dict[str, Any]) -> PictureJob:
        self._items[item.item_dir] = item
        return PictureJob(
            item_dir=item.item_dir,
            index=item.prompt_index,
            seed=item.seed,
            fingerprint=self._fingerprints(item),
            recipe=self._job.recipe(item, self._report),
            details=details,
            output_file=self._output_file,
        )

    def _on_done(self, outcome: Outcome) -> None:
        """Called from the writer's threads."""
        item = self._items.pop(outcome.job.item_dir)
        if outcome.status != "bad":
            self._on_settled(outcome)
        elif outcome.job.details["attempt"] < MAX_ATTEMPTS:
            self._again.append((item, outcome.error or "bad picture"))
        else:
            self._items[outcome.job.item_dir] = item
            self._writer.fail(outcome.job, outcome.error or "bad picture")
