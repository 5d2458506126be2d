"""One run: plan, session, progress, failure policy, report. No Hydra, no torch; the loop itself is in drawing.py."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from zimage_runner.article import Report, article_table
from zimage_runner.composed import Later
from zimage_runner.config.schema import RunConfig
from zimage_runner.drawing import Drawing
from zimage_runner.dry_run import comparable, describe
from zimage_runner.errors import RunStopped
from zimage_runner.executors.base import Batch, Executor
from zimage_runner.job import Job, prepare
from zimage_runner.logs import run_log, say
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.summary import Summary, table
from zimage_runner.outputs.writer import Outcome
from zimage_runner.pace import Pace
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, snapshot
from zimage_runner.resume import Progress, check_same_pictures, survey
from zimage_runner.reuse import Reuse
from zimage_runner.signals import EXIT_INTERRUPTED, PATIENCE, graceful_stop
from zimage_runner.warm import Executors, current_executors

log = logging.getLogger(__name__)

RECORDS = "records.jsonl"
OF_ONE_JOB = ("phases", "warmup_passes")
"""What a session's report says of the job that it got ready for last."""
TRUNCATIONS_TOLD = 10


def run(config: RunConfig, directory: Path, composed: Mapping[str, str]) -> int | Later:
    """Do one job in ``directory``; ``composed`` are the files of its ``.hydra`` folder.

    Returns the exit code; within a multirun it may come later, when the next job's first pictures are on their way.
    """
    with _executors() as executors:
        with executors.stop.interruptible(PATIENCE):  # it may download and hash gigabytes
            job = prepare(config, executors.memo)
        if config.dry_run:
            say(describe(job, progress_of(job, directory, Ledger.load(directory / RECORDS)).is_settled), sys.stdout)
            return 0
        with contextlib.ExitStack() as held:
            return _draw(job, held.enter_context(_open(config, directory)), held, executors, composed)


def _draw(
    job: Job, run_dir: RunDirectory, held: contextlib.ExitStack, executors: Executors, composed: Mapping[str, str]
) -> int | Later:
    """``held`` keeps the run directory open; it is taken over where the run's end comes later."""
    config, ledger = job.config, Ledger.load(run_dir.records_path)
    progress = progress_of(job, run_dir.path, ledger)
    if not progress.todo and config.resume is not None:
        say(f"nothing to draw: {progress}")
        say(str(run_dir.path), sys.stdout)
        return 1 if progress.failed else 0
    if config.skip_existing is not None:
        executors.catch_up()  # the job before may have what this one skips
    run_dir.check_space([(i.params.height, i.params.width) for i in progress.todo], config.output)
    with executors.lease(job) as executor, run_log(run_dir.log_path):
        this = Run(job, run_dir, executor, executors, ledger, progress)
        this.begin(composed)
    return executors.conclude(executor, functools.partial(_end, this, held.pop_all()))


def _end(this: Run, held: contextlib.ExitStack) -> int:
    with held, run_log(this.run_dir.log_path):
        return this.end()


@contextlib.contextmanager
def _executors() -> Iterator[Executors]:
    """The multirun's, which stay warm for the next job, or this run's own."""
    shared = current_executors()
    if shared is not None:
        yield shared
        return
    with graceful_stop() as stop, contextlib.closing(Executors(stop)) as executors:
        yield executors


def _open(config: RunConfig, directory: Path) -> RunDirectory:
    return RunDirectory.create(directory) if config.resume is None else RunDirectory.resume(directory)


def progress_of(job: Job, directory: Path, ledger: Ledger) -> Progress:
    """What earlier processes did of the plan; nothing unless the run is resumed."""
    if job.config.resume is None:
        return Progress(todo=job.plan.items)
    return survey(directory, ledger, job.plan.items, verify=job.config.verify, retry=job.config.retry)


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
        self._stopped: str | None = None
        self._bar: tqdm | None = None
        self._pace = Pace(planned=len(job.plan), settled=len(progress.done))
        self._open = contextlib.ExitStack()

    def begin(self, composed: Mapping[str, str]) -> None:
        """Hand everything that is left to the executor; the last pictures may still be on their way after it."""
        self._write_settings(composed)
        self._tell_truncations()
        with contextlib.ExitStack() as unless_begun:
            unless_begun.enter_context(self._open)
            self._open.enter_context(contextlib.closing(self.ledger.open(self.run_dir.dir_fd)))
            if not self.executors.is_behind:  # two bars at a time would write over each other
                self._show_progress()
            self._reused(self.reuse.from_earlier_runs(self.progress.todo))
            self._drawing = Drawing(
                self.job, self.run_dir, self.ledger, self.fingerprints, self.report, on_settled=self._on_settled
            )
            self._open.callback(self._guarded, self._drawing.close)
            self.summary.start_clock()
            self._guarded(self._submit)
            self._on_submitted()
            unless_begun.pop_all()

    def _submit(self) -> None:
        self._drawing.begin(self.executor, self._batches(), self.executors.stop, self._on_submitted)

    def end(self) -> int:
        """Wait until everything is written, draw once more what came out bad, report; the exit code."""
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
        self._show_progress()

    def _show_progress(self) -> None:
        """Open the bar, or bring it up to date."""
        if self._bar is None:
            self._bar = self._open.enter_context(
                tqdm(
                    total=len(self.job.plan),
                    initial=self.summary.already_done,
                    unit="image",
                    disable=not sys.stderr.isatty(),
                    smoothing=0.1,
                )
            )
        self._bar.update(self.summary.settled - self._bar.n)

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
        if self._bar is not None:
            self._bar.update(self.summary.settled - self._bar.n)
        if line := self._pace.line(self.summary.settled):
            log.info("%s", line)
            if not sys.stderr.isatty():
                say(line)

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
        say(table(summary))
        log.info("the run ended:\n%s", table(summary))
        if self.job.config.report is Report.article:
            say(article_table(summary))
        say(str(self.run_dir.path), sys.stdout)
        return EXIT_INTERRUPTED if summary["items"]["remaining"] else 1 if self.summary.failed else 0
