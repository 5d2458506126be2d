"""One pass over a plan: settings, drawing, failure policy, report. The loop itself is in drawing.py."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping

from zimage_runner.errors import RunStopped
from zimage_runner.executors.base import Batch, Executor
from zimage_runner.exit_codes import EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, EXIT_OK
from zimage_runner.logs import say
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.summary import Summary, brief, table
from zimage_runner.outputs.survey import Progress, check_same_pictures
from zimage_runner.outputs.writer import Outcome
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, snapshot
from zimage_runner.runner.article import Report, article_table
from zimage_runner.runner.dry_run import comparable
from zimage_runner.runner.job import Job
from zimage_runner.runner.loop import Drawing
from zimage_runner.runner.pool import Executors
from zimage_runner.runner.progress import Display
from zimage_runner.runner.reuse import Reuse

log = logging.getLogger(__name__)

OF_ONE_JOB = ("phases", "warmup_passes")
"""What a session's report says of the job that it got ready for last."""
TRUNCATIONS_TOLD = 10


class Run:
    """One pass over the plan in an open run directory: ``begin``, then ``end``."""

    def __init__(
        self,
        job: Job,
        run_dir: RunDirectory,
        executor: Executor,
        executors: Executors,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self.executor = executor
        self.executors = executors
        self.ledger = ledger
        self.progress = progress
        self.report = executor.report()
        self.fingerprints = Fingerprints(job.checkpoint.digest, self.report["numerics"])
        self.reuse = Reuse(job, run_dir, ledger, self.fingerprints, self.report)
        self.summary = Summary(run_dir.path, planned=len(job.plan), already_done=len(progress.done))
        self._drawing: Drawing
        self._label = executors.job_label
        self._stopped: str | None = None
        self._display = Display(planned=len(job.plan), settled=len(progress.done))
        self._open = contextlib.ExitStack()

    def begin(self, composed: Mapping[str, str]) -> None:
        """Hand everything that is left to the executor; the last pictures may still be on their way after it."""
        self._write_settings(composed)
        self._tell_truncations()
        with contextlib.ExitStack() as unless_begun:
            unless_begun.enter_context(self._open)
            self._open.enter_context(contextlib.closing(self.ledger.open(self.run_dir.dir_fd)))
            self._open.callback(self._display.close)
            if not self.executors.is_behind:  # two bars at a time would write over each other
                self._display.open()
            self._reused(self.reuse.from_earlier_runs(self.progress.todo))
            self._drawing = Drawing(
                self.job, self.run_dir, self.ledger, self.fingerprints, self.report, on_settled=self._on_settled
            )
            self._open.callback(self._guarded, self._drawing.close)
            self.summary.start_clock()
            self._guarded(self._submit)
            self._on_submitted()
            unless_begun.pop_all()
        self._display.tells = False

    def _submit(self) -> None:
        self._drawing.begin(self.executor, self._batches(), self.executors.stop, self._on_submitted)

    def end(self) -> int:
        """Wait until everything is written, draw once more what came out bad, report; the exit code."""
        self._display.tells = True
        self.summary.leave_out_wait()
        with self._open:
            self._guarded(self._finish_drawing)
        self.executors.last_arrival = self.summary.last_arrival
        return self._tell()

    def _finish_drawing(self) -> None:
        if self._stopped is None:
            self._drawing.finish()
            self._reused(self.reuse.among_own(self.progress.is_settled))

    def _guarded(self, step: Callable[[], None]) -> None:
        """A step of drawing and writing; why it ended early, if it did, is kept for the summary."""
        try:
            step()
        except RunStopped as error:
            self._stopped = self._stopped or str(error)

    def _write_settings(self, composed: Mapping[str, str]) -> None:
        """A new run leaves its prompts and settings for a later ``resume``; a resumed one is checked against them."""
        kind = ", ".join(f"{name}={value}" for name, value in self.report["numerics"].items())
        log.info("%d of %d pictures to draw (%s)", len(self.progress.todo), len(self.job.plan), kind)
        if self.job.config.resume is None:
            # The settings come last: a directory that has them is complete enough to be resumed.
            self.run_dir.write_file(SNAPSHOT_NAME, snapshot(self.job.plan.prompts))
            for name, text in composed.items():
                self.run_dir.write_file(f".hydra/{name}", text.encode())
            return
        check_same_pictures(
            self.run_dir.path, self.ledger, self.job.plan.items, self.fingerprints, self.report["numerics"]
        )
        log.info("resumed: %s", self.progress)
        if self.progress.damaged:
            log.warning("%s", self.progress)

    def _tell_truncations(self) -> None:
        truncations = self.job.plan.truncations
        for truncation in truncations[:TRUNCATIONS_TOLD]:
            log.warning("%s", truncation)
        if len(truncations) > TRUNCATIONS_TOLD:
            log.warning("%d prompts are cut off in all: summary.json names each", len(truncations))
        for truncation in truncations:
            self.summary.truncated.append({"prompt": truncation.prompt.source, "message": str(truncation)})

    def _on_submitted(self) -> None:
        """The executor is busy with this run: time for what is left of the job before it."""
        self.executors.catch_up()
        self.summary.not_before(self.executors.last_arrival)
        self._drawing.not_before(self.executors.last_arrival)
        self._display.open()
        self._display.update(self.summary.settled)

    def _reused(self, item_dirs: list[str]) -> None:
        """Count pictures that were linked instead of drawn."""
        self.progress.done.update(item_dirs)
        self.summary.linked += len(item_dirs)
        if item_dirs:
            log.info("%d pictures were linked instead of drawn", len(item_dirs))

    def _batches(self) -> Iterator[Batch]:
        def settled(item: WorkItem) -> bool:
            return self.progress.is_settled(item) or self.reuse.waits(item)

        for items in self.job.plan.batches(self.job.config.engine.largest_batch, settled, self.progress.todo):
            yield Batch(items=items)

    def _on_settled(self, outcome: Outcome) -> None:
        """Called from the writer's threads."""
        self.summary.add(outcome)
        self._display.update(self.summary.settled)

    def _tell(self) -> int:
        """Write and print the summary; the exit code."""
        own = {name: self.report[name] for name in OF_ONE_JOB if name in self.report}
        report = {**self.executor.report(), **own}  # the session may be getting the next job's pictures ready
        summary = self.summary.to_dict(report, stopped=self._stopped or self.executors.stop.signal_name)
        summary["comparable"] = comparable(self.job)
        try:
            self.run_dir.write_file("summary.json", readable_json(summary))
        except RunStopped as error:
            log.warning("%s", error)
        say(f"{self._label}: {brief(summary)}" if self._label else table(summary))
        log.info("the run ended:\n%s", table(summary))
        if self.job.config.report is Report.article:
            say(article_table(summary))
        say(str(self.run_dir.path), sys.stdout)
        if summary["items"]["remaining"]:
            return EXIT_INTERRUPTED
        return EXIT_ITEMS_FAILED if self.summary.failed else EXIT_OK
