"""One run: plan, session, progress, failure policy, report. No Hydra, no torch; the loop itself is in drawing.py."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from zimage_runner.article import Report, article_table
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
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, snapshot
from zimage_runner.resume import Progress, check_same_pictures, survey
from zimage_runner.reuse import Reuse
from zimage_runner.signals import EXIT_INTERRUPTED, PATIENCE, StopRequest, graceful_stop
from zimage_runner.warm import Executors, current_executors

log = logging.getLogger(__name__)

RECORDS = "records.jsonl"
TRUNCATIONS_TOLD = 10


def run(config: RunConfig, directory: Path, composed: Mapping[str, str]) -> int:
    """Do one job in ``directory``; ``composed`` are the files of its ``.hydra`` folder. Returns the exit code."""
    with _executors() as executors:
        with executors.stop.interruptible(PATIENCE):  # it may download and hash gigabytes
            job = prepare(config, executors.memo)
        if config.dry_run:
            say(describe(job, progress_of(job, directory, Ledger.load(directory / RECORDS)).is_settled), sys.stdout)
            return 0
        with _open(config, directory) as run_dir:
            return _draw(job, run_dir, executors, composed)


def _draw(job: Job, run_dir: RunDirectory, executors: Executors, composed: Mapping[str, str]) -> int:
    config, ledger = job.config, Ledger.load(run_dir.records_path)
    progress = progress_of(job, run_dir.path, ledger)
    if not progress.todo and config.resume is not None:
        say(f"nothing to draw: {progress}")
        say(str(run_dir.path), sys.stdout)
        return 1 if progress.failed else 0
    run_dir.check_space([(i.params.height, i.params.width) for i in progress.todo], config.output)
    with executors.lease(job) as executor, run_log(run_dir.log_path):
        return Run(job, run_dir, executor, executors.stop, ledger, progress).execute(composed)


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
    """One pass over the plan in an open run directory."""

    def __init__(
        self,
        job: Job,
        run_dir: RunDirectory,
        executor: Executor,
        stop: StopRequest,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self.executor = executor
        self.stop = stop
        self.ledger = ledger
        self.progress = progress
        self.report = executor.report()
        self.fingerprints = Fingerprints(job.checkpoint.digest, self.report["numerics"])
        self.reuse = Reuse(job, run_dir, ledger, self.fingerprints, self.report)
        self.summary = Summary(run_dir.path, planned=len(job.plan), already_done=len(progress.done))
        self._bar = tqdm(
            total=len(job.plan),
            initial=len(progress.done),
            unit="image",
            disable=not sys.stderr.isatty(),
            smoothing=0.1,
        )

    def execute(self, composed: Mapping[str, str]) -> int:
        """Draw and write every item that is left, report, and return the exit code."""
        self._begin(composed)
        self._tell_truncations()
        with contextlib.closing(self.ledger.open(self.run_dir.dir_fd)), self._bar:
            self._reused(self.reuse.from_earlier_runs(self.progress.todo))
            drawing = Drawing(
                self.job, self.run_dir, self.ledger, self.fingerprints, self.report, on_settled=self._on_settled
            )
            self.summary.start_clock()
            stopped = self._draw_all(drawing)
        return self._finish(stopped)

    def _begin(self, composed: Mapping[str, str]) -> None:
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

    def _draw_all(self, drawing: Drawing) -> str | None:
        """Draw and write what can be; why that ended early, if it did."""
        try:
            drawing.run(self.executor, self._batches(), self.stop)
            self._reused(self.reuse.among_own(self.progress.is_settled))
        except RunStopped as error:
            return str(error)
        return self.stop.signal_name

    def _reused(self, item_dirs: list[str]) -> None:
        """Count pictures that were linked instead of drawn."""
        self.progress.done.update(item_dirs)
        self.summary.linked += len(item_dirs)
        self._bar.update(len(item_dirs))
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
        self._bar.update()

    def _finish(self, stopped: str | None) -> int:
        """Write and print the summary; the exit code."""
        summary = self.summary.to_dict(self.executor.report(), stopped=stopped)
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
