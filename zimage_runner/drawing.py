"""The loop itself: batches to the executor, pictures to the writer, and what came out bad once more."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zimage_runner.executors.base import Batch, Executor
from zimage_runner.job import Job
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.writer import Outcome, PictureJob, Writer
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.signals import StopRequest

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A picture that comes out bad (NaN, one single colour) is drawn once more before its item counts as failed."""


class Drawing:
    """Draws items and has them written to an open run directory."""

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
        self._again: list[WorkItem] = []
        self._items: dict[str, WorkItem] = {}
        self._writer = Writer(run_dir, ledger, job.config.output, self._on_done)

    def run(self, executor: Executor, batches: Iterable[Batch], stop: StopRequest) -> None:
        """Draw the batches, then whatever came out bad once more; all is written when this returns."""
        self._writer.start_clock()
        with contextlib.closing(self._writer):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                self._draw(executor, itertools.takewhile(lambda _: not stop, batches), attempt)
                again, self._again = self._again, []
                if not again or stop:
                    return
                batches = [Batch(items=[item], attempt=attempt + 1) for item in again]

    def _draw(self, executor: Executor, batches: Iterator[Batch], attempt: int) -> None:
        for result in executor.run(batches):
            jobs = [self._picture_job(item, {**result.details, "attempt": attempt}) for item in result.items]
            if result.images is not None:
                self._writer.submit(jobs, result.images)
            else:
                for picture in jobs:
                    self._writer.fail(picture, result.error or "unknown error")
        self._writer.flush()

    def _picture_job(self, item: WorkItem, details: dict[str, Any]) -> PictureJob:
        self._items[item.item_dir] = item
        return PictureJob(
            item_dir=item.item_dir,
            index=item.prompt_index,
            seed=item.seed,
            fingerprint=self._fingerprints(item),
            recipe=self._job.recipe(item, self._report),
            details=details,
            output_file=self._job.config.output_file,
        )

    def _on_done(self, outcome: Outcome) -> None:
        """Called from the writer's threads."""
        item = self._items.pop(outcome.job.item_dir)
        if outcome.status != "bad":
            self._on_settled(outcome)
        elif outcome.job.details["attempt"] < MAX_ATTEMPTS:
            log.warning("%s: %s, drawing it once more", outcome.job.item_dir, outcome.error)
            self._again.append(item)
        else:
            self._items[outcome.job.item_dir] = item
            self._writer.fail(outcome.job, outcome.error or "bad picture")
