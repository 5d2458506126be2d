"""One pass over a plan in a run directory: settings, drawing, failures, report."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from zimage_runner.config.schema import Report
from zimage_runner.errors import (
    EXIT_INTERRUPTED,
    EXIT_ITEMS_FAILED,
    EXIT_OK,
    RunStopped,
    UserError,
    counted,
    error_text,
)
from zimage_runner.executors.base import Batch
from zimage_runner.logs import say
from zimage_runner.outputs.config import Fsync, Shards
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.summary import Summary, brief, table
from zimage_runner.outputs.survey import Progress, check_same_pictures
from zimage_runner.outputs.writer import Outcome
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, snapshot
from zimage_runner.runner.article import article_table
from zimage_runner.runner.dry_run import comparable
from zimage_runner.runner.loop import GenerationLoop
from zimage_runner.runner.pool import Lease
from zimage_runner.runner.progress import ProgressDisplay
from zimage_runner.runner.reuse import Reuse, same_elsewhere
from zimage_runner.runner.spec import RunSpec
from zimage_runner.signals import exit_at_once

log = logging.getLogger(__name__)

OF_ONE_RUN = ("phases", "warmup_passes")
"""What a session's report says of the run that it got ready for last."""
TRUNCATIONS_LOGGED = 10
LAST_PATIENCE = 30.0
"""Seconds for writing what has arrived when a picture that takes too long ends the process."""
LAST_SETTINGS = "overrides.yaml"
"""The file of a run's ``.hydra`` folder that resuming looks for."""


class Run:
    """One pass over the plan in an open run directory: ``draw``, then ``report``."""

    def __init__(self, spec: RunSpec, run_dir: RunDirectory, ledger: Ledger, progress: Progress, lease: Lease) -> None:
        """``progress``: what earlier processes did of the plan. Nothing is opened, started or written yet."""
        self.spec = spec
        self.run_dir = run_dir
        self.ledger = ledger
        self.progress = progress
        self.lease = lease
        self.session_report = lease.report()
        self.fingerprints = Fingerprints(spec.checkpoint.digest, self.session_report["numerics"])
        self.reuse = Reuse(spec, run_dir, ledger, self.fingerprints, self.session_report)
        self.summary = Summary(run_dir.path, planned=len(spec.plan), already_done=len(progress.done))
        self._display = ProgressDisplay(planned=len(spec.plan), settled=len(progress.done))
        self._loop = GenerationLoop(
            spec, run_dir, ledger, lease, self.fingerprints, self.session_report, self._on_settled, self._end_overdue
        )
        self._sync = spec.config.output.fsync is Fsync.item
        self._stopped: str | None = None
        self._broken = False
        """Something went wrong that nothing foresees: the exit code tells, also where no picture is missing."""
        self._is_settled = True
        """Whether files of many pictures are finished, and uploaded where that is asked for."""
        self._open = contextlib.ExitStack()

    def draw(self, files: Mapping[str, str]) -> None:
        """Hand everything that is left to the executor. The last images may still be on their way after it.

        ``files``: name and text of each file of the run's ``.hydra`` folder.
        """
        self._write_settings(files)
        self._tell_of_same_pictures()
        self._log_truncations()
        with contextlib.ExitStack() as opened:
            opened.enter_context(contextlib.closing(self.ledger.open(self.run_dir.dir_fd, sync=self._sync)))
            opened.callback(self._display.close)
            opened.callback(self._guarded, self._loop.close)
            self._loop.begin(self.progress.damaged)
            self.reuse.put_into(self._loop.files)
            self._display.open()
            self._count_linked(self.reuse.from_earlier_runs(self.progress.todo))
            self.summary.start_clock()
            self._loop.start_clock()
            self._guarded(self._draw)
            self._open = opened.pop_all()
        self._display.logs = False  # until ``report``, the log may be the next run's

    def _draw(self) -> None:
        self._loop.offer_writing()
        try:
            self._loop.draw(self._batches())
        except UserError as error:  # what was drawn before is kept, whatever it is
            raise RunStopped(str(error)) from error

    def report(self) -> int:
        """Wait until everything is written, draw once more what came out bad, and report. Return the exit code."""
        self._display.logs = True
        self.summary.leave_out_wait()
        with self._open:
            self._guarded(self._finish)
        return self._write_summary(self._last_report())

    def _finish(self) -> None:
        if self._stopped is None:
            self._loop.finish()
            self._count_linked(self.reuse.among_own(self.progress.is_settled))
            self._is_settled = False
            self._loop.settle(complete=isinstance(self.spec.config.output, Shards) and self._is_complete)
            self._is_settled = True

    @property
    def _is_complete(self) -> bool:
        """Whether every item of the plan has its picture."""
        entries = self.ledger.entries
        return all((e := entries.get(item.item_dir)) is not None and e.ok for item in self.spec.plan.items)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Do a step of drawing and writing. Why it ended early, if it did, is kept for the summary.

        What is finished is kept whatever happens, so anything that goes wrong here leaves a run to be resumed.
        """
        try:
            step()
        except RunStopped as error:
            self._stopped = self._stopped or str(error)
            self.lease.end_after_run()
        except UserError:
            raise
        except Exception as error:
            self._stopped, self._broken = self._stopped or error_text(error), True
            self.lease.end_after_run()
            log.error("%s: the run cannot go on: %s", self.run_dir.path, error_text(error), exc_info=error)

    def _write_settings(self, files: Mapping[str, str]) -> None:
        """Leave prompts and settings for a later ``resume``; check a resumed run against those that it has."""
        numerics = self.session_report["numerics"]
        kind = ", ".join(f"{name}={value}" for name, value in numerics.items())
        log.info("%d of %s to draw (%s)", len(self.progress.todo), counted(len(self.spec.plan), "picture"), kind)
        if self.spec.config.resume is None:
            # Before the first picture counts. The overrides come last: a directory that has them can be resumed.
            sync = self._sync
            self.run_dir.write_file(SNAPSHOT_NAME, snapshot(self.spec.plan.prompts), sync=sync)
            for name in sorted(files, key=lambda name: name == LAST_SETTINGS):
                self.run_dir.write_file(f".hydra/{name}", files[name].encode(), sync=sync)
            if sync:
                self.run_dir.sync_name()
            return
        check_same_pictures(self.run_dir.path, self.ledger, self.spec.plan.items, self.fingerprints, numerics)
        log.info("resumed: %s", self.progress)
        if self.progress.damaged:
            log.warning("%s", self.progress)

    def _tell_of_same_pictures(self) -> None:
        """Say which earlier run has pictures of this one, with the words that reuse them."""
        if self.lease.label or self.spec.config.resume is not None or self.spec.config.skip_existing is not None:
            return
        try:
            found = same_elsewhere(self.run_dir.path, self.progress.todo, self.fingerprints)
        except (OSError, UserError) as error:
            log.debug("earlier runs were not looked at: %s", error)
            return
        if found is not None:
            count, run = found
            there = f"{count:,} of these pictures {'is' if count == 1 else 'are'} in {os.path.relpath(run)} already"
            say(f"{there}: skip_existing={os.path.relpath(run)} links instead of drawing")

    def _log_truncations(self) -> None:
        truncations = self.spec.plan.truncations
        for truncation in truncations[:TRUNCATIONS_LOGGED]:
            log.warning("%s", truncation)
        if len(truncations) > TRUNCATIONS_LOGGED:
            log.warning("%s in all are cut off: summary.json names each", counted(len(truncations), "prompt"))
        for truncation in truncations:
            self.summary.truncated.append({"prompt": truncation.prompt.source, "message": str(truncation)})

    def _batches(self) -> Iterator[Batch]:
        """Yield what is to be drawn, until a signal asks the run to stop."""

        def settled(item: WorkItem) -> bool:
            return self.progress.is_settled(item) or self.reuse.waits(item)

        for items in self.spec.plan.batches(self.spec.config.engine.largest_batch, settled, self.progress.todo):
            if self.lease.stop:
                return
            yield Batch(items=items)

    def _count_linked(self, item_dirs: list[str]) -> None:
        """Count pictures that were linked instead of drawn."""
        self.progress.done.update(item_dirs)
        self.summary.linked += len(item_dirs)
        if item_dirs:
            log.info("%s linked instead of drawn", counted(len(item_dirs), "picture was", "pictures were"))

    def _on_settled(self, outcome: Outcome) -> None:
        """Called from the writer's threads."""
        self.summary.add(outcome)
        self._display.update(self.summary.settled)

    def _end_overdue(self, items: Sequence[WorkItem], reason: str) -> None:
        """End the process, resumable: ``items`` cannot be given up in it. Called from a thread of its own."""
        code = EXIT_INTERRUPTED
        try:
            more = f" and {len(items) - 1} more" if len(items) > 1 else ""
            self._stopped = (
                f"{items[0].item_dir}{more}: {reason}, and cannot be given up in this process: resume with "
                "executor=process, where it can"
            )
            log.error("%s", self._stopped)
            with contextlib.suppress(RunStopped):
                self._loop.give_up(items, reason, LAST_PATIENCE)
            self._display.close()
            code = self._write_summary(self.session_report)
        finally:
            exit_at_once(code)

    def _last_report(self) -> Mapping[str, Any]:
        """Return what the session has to say at the end, or where it cannot what it said when it was ready."""
        try:
            return self.lease.report()
        except Exception as error:
            log.warning("the session's figures are those of its start: %s", error_text(error))
            return self.session_report

    def _write_summary(self, report: Mapping[str, Any]) -> int:
        """Write and print the summary, with the session's ``report``. Return the exit code."""
        own = {name: self.session_report[name] for name in OF_ONE_RUN if name in self.session_report}
        report = {**report, **own}  # the session may be getting the next run's pictures ready
        stopped = self._stopped or self.lease.stop.signal_name
        summary = self.summary.to_dict(report, stopped=stopped, is_settled=self._is_settled)
        summary["comparable"] = comparable(self.spec)
        try:
            self.run_dir.write_file("summary.json", readable_json(summary))
        except RunStopped as error:
            log.warning("%s", error)
        say(f"{self.lease.label}: {brief(summary)}" if self.lease.label else table(summary))
        log.info("the run ended:\n%s", table(summary))
        if self.spec.config.report is Report.article:
            say(article_table(summary))
        self._leave_report(summary)
        say(str(self.run_dir.path), sys.stdout)
        if summary["items"]["remaining"] or not self._is_settled:
            return EXIT_INTERRUPTED
        return EXIT_ITEMS_FAILED if self.summary.failed or self._broken else EXIT_OK

    def _leave_report(self, summary: dict[str, Any]) -> None:
        """Write report.html for a run that is finished and has something new."""
        items = summary["items"]
        new = items["ok"] + items["linked"] + items["failed"]
        if items["remaining"] or not new or not self.spec.config.output.reports(len(self.spec.plan)):
            return
        from zimage_runner.view.report import leave_report

        leave_report(self.run_dir.path, lambda: bool(self.lease.stop))
