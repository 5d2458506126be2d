"""The loop: batches to the executor, its images to the writer, and what came out bad once more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zimage_runner.executors.base import Batch, Written
from zimage_runner.executors.watchdog import OnOverdue
from zimage_runner.outputs.item_files import Filed, ItemFiles, WriteRequest
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.writer import Outcome, Writer
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.runner.pool import Lease
from zimage_runner.runner.spec import RunSpec
from zimage_runner.runner.worker_writes import WorkerSink

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A picture that comes out bad (NaN, one single colour) is drawn once more before its item counts as failed."""


class GenerationLoop:
    """Draws items and has them written to an open run directory: ``draw``, ``finish``, ``close``."""

    def __init__(
        self,
        spec: RunSpec,
        run_dir: RunDirectory,
        ledger: Ledger,
        lease: Lease,
        fingerprints: Fingerprints,
        session_report: dict[str, Any],
        on_settled: Callable[[Outcome], None],
        on_overdue: OnOverdue,
    ) -> None:
        """``session_report``: for the records. ``on_settled`` hears of each item that is done or failed, ``on_overdue``
        of those that are drawn for too long and cannot be given up."""
        self._spec = spec
        self._lease = lease
        self._fingerprints = fingerprints
        self._session_report = session_report
        self._on_settled = on_settled
        self._on_overdue = on_overdue
        self._bad: list[tuple[WorkItem, str]] = []
        """Items whose picture was bad, and why."""
        self._output_file = None if spec.output_file is None else str(spec.output_file)
        self._items: dict[str, WorkItem] = {}
        self._recipe = spec.recipe
        self._writer = Writer(
            run_dir,
            ledger,
            spec.config.output,
            self._on_done,
            lease.arrivals,
            thumbnails=spec.config.output.reports(len(spec.plan)),
        )
        self._run_dir = run_dir

    def offer_writing(self) -> None:
        """Let workers that see the run directory write into it, where the executor has such workers."""
        if not self._lease.has_workers_elsewhere:
            return
        self._lease.write_with(
            WorkerSink(
                directory=str(self._run_dir.path.absolute()),
                token=self._run_dir.admit_workers(),
                output=self._spec.config.output,
                recipe=self._recipe,
                report={name: self._session_report[name] for name in ("numerics", "versions")},
                output_file=self._output_file,
                thumbnails=self._spec.config.output.reports(len(self._spec.plan)),
            )
        )

    def start_clock(self) -> None:
        """Count the first picture's seconds from here."""
        self._writer.start_clock()

    @property
    def files(self) -> ItemFiles:
        """What the pictures are put into."""
        return self._writer.files

    def begin(self, damaged: Mapping[str, str]) -> None:
        """Make the run's files ready; ``damaged``: pictures that are drawn again, and why. Raises DiskError."""
        self._writer.begin(damaged)

    def settle(self, *, complete: bool) -> None:
        """Finish files that hold many pictures; ``complete``: none is missing. Raises RunStopped."""
        self._writer.settle(complete=complete)

    def draw(self, batches: Iterable[Batch]) -> None:
        """Hand the batches to the executor and its images to the writer, where the last may still be on their way."""
        for result in self._lease.run(batches, self._on_overdue):
            details = {**result.details, "attempt": result.attempt}
            requests = [
                self._write_request(item, details, is_written=result.written is not None) for item in result.items
            ]
            if result.images is not None:
                self._writer.submit(requests, result.images)
            elif result.written is not None:
                self._writer.record(requests, [_filed(written) for written in result.written])
            else:
                for request in requests:
                    self._writer.fail(request, result.error or "unknown error")

    def finish(self) -> None:
        """Wait until all is written. Draw once more what came out bad."""
        attempt = 1
        self._writer.flush()
        while self._bad and not self._lease.stop:
            bad, self._bad = self._bad, []
            attempt += 1
            for item, error in bad:
                log.warning("%s: %s, drawing it once more", item.item_dir, error)
            self.draw([Batch(items=[item], attempt=attempt) for item, _ in bad])
            self._writer.flush()

    def give_up(self, items: Sequence[WorkItem], error: str, patience: float) -> None:
        """Write down that ``items`` failed, and what has arrived before: ``patience`` seconds, whatever is under way.

        Called from any thread, for a process that ends now.
        """
        for item in items:
            self._writer.fail(self._write_request(item, {"attempt": 1}, is_written=False), error)
        self._writer.write_arrived(patience)

    def close(self) -> None:
        """Write what is queued and end the writer. Raise DiskError if something could not be written."""
        if self._lease.has_workers_elsewhere:
            self._lease.write_with(None)
            self._run_dir.dismiss_workers()
        self._writer.close()

    def _write_request(self, item: WorkItem, details: dict[str, Any], *, is_written: bool) -> WriteRequest:
        """``is_written``: by a worker, which has made the recipe itself."""
        self._items[item.item_dir] = item
        return WriteRequest(
            item_dir=item.item_dir,
            index=item.prompt_index,
            seed=item.seed,
            fingerprint=self._fingerprints(item),
            recipe={} if is_written else self._recipe(item, self._session_report),
            details=details,
            output_file=self._output_file,
        )

    def _on_done(self, outcome: Outcome) -> None:
        """Called from the writer's threads."""
        item = self._items.pop(outcome.request.item_dir)
        if outcome.status != "bad":
            self._on_settled(outcome)
        elif outcome.request.details["attempt"] < MAX_ATTEMPTS:
            self._bad.append((item, outcome.error or "bad picture"))
        else:
            self._items[outcome.request.item_dir] = item
            self._writer.fail(outcome.request, outcome.error or "bad picture")


def _filed(written: Written) -> Filed | str:
    """What the writer makes of what a worker has written; why there is no picture, where it has not."""
    if written.status == "bad":
        return written.error or "bad picture"
    return Filed(line=written.line, error=written.error)
