"""From a composed config to a finished run: plan, lock, progress, executor. No Hydra, no torch; see run.py."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import RunStopped, UserError, error_text
from zimage_runner.exit_codes import EXIT_ITEMS_FAILED, EXIT_OK, Later, refuse
from zimage_runner.logs import run_log, say
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.summary import Summary
from zimage_runner.outputs.survey import Progress, survey
from zimage_runner.runner.composed import Composed
from zimage_runner.runner.dry_run import describe
from zimage_runner.runner.job import Job, prepare
from zimage_runner.runner.pool import Executors, current_executors
from zimage_runner.runner.run import Run
from zimage_runner.signals import PATIENCE, graceful_stop

log = logging.getLogger(__name__)


def execute(composed: Composed) -> int | Later:
    """Run it; the exit code, within a multirun perhaps later. What the user can mend is said in one line on stderr."""
    try:
        return run(composed.config, composed.directory, composed.files)
    except (UserError, RunStopped) as error:  # here and not in main: Hydra would print a line of its own
        if (shared := current_executors()) is not None:
            shared.catch_up()
        return refuse(str(error))
    finally:
        composed.remove_unused_directory()


def run(config: RunConfig, directory: Path, composed: Mapping[str, str]) -> int | Later:
    """Do one job in ``directory``; ``composed`` are the files of its ``.hydra`` folder.

    Returns the exit code; within a multirun it may come later, when the next job's first pictures are on their way.
    """
    with _executors() as executors:
        with executors.stop.interruptible(PATIENCE):  # it may download and hash gigabytes
            job = prepare(config, executors.memo)
        if config.dry_run:
            executors.catch_up()
            say(describe(job, progress_of(job, directory, Ledger.load(directory / RECORDS)).is_settled), sys.stdout)
            return EXIT_OK
        with contextlib.ExitStack() as held:
            return _draw(job, held.enter_context(_open(config, directory)), held, executors, composed)


def _draw(
    job: Job, run_dir: RunDirectory, held: contextlib.ExitStack, executors: Executors, composed: Mapping[str, str]
) -> int | Later:
    """``held`` keeps the run directory open; it is taken over where the run's end comes later."""
    config, ledger = job.config, Ledger.load(run_dir.records_path)
    progress = progress_of(job, run_dir.path, ledger)
    if not progress.todo and config.resume is not None:
        executors.catch_up()
        return _nothing_to_draw(job, run_dir, progress)
    if config.skip_existing is not None or config.output_file is not None:
        executors.catch_up()  # the job before may have what this one skips, and may write that file too
    run_dir.check_space([(i.params.height, i.params.width) for i in progress.todo], config.output)
    with executors.lease(job) as executor, run_log(run_dir.log_path):
        this = Run(job, run_dir, executor, executors, ledger, progress)
        this.begin(composed)
    return executors.conclude(executor, functools.partial(_end, this, held.pop_all()))


def _end(this: Run, held: contextlib.ExitStack) -> int:
    """Whatever goes wrong is this run's own affair: the next one may be drawing already."""
    with held, run_log(this.run_dir.log_path):
        try:
            return this.end()
        except (UserError, RunStopped) as error:
            return refuse(f"{this.run_dir.path}: {error}")
        except Exception as error:
            log.error("%s: %s", this.run_dir.path, error_text(error), exc_info=error)
            return EXIT_ITEMS_FAILED


def _nothing_to_draw(job: Job, run_dir: RunDirectory, progress: Progress) -> int:
    """Say so. A process that was killed before its run's end has left no summary, or the one of an earlier end."""
    summary = Summary(run_dir.path, planned=len(job.plan), already_done=len(progress.done)).to_dict({})
    if not progress.skipped and _status(Inside(run_dir.path, run_dir.summary_path.name)) != summary["status"]:
        run_dir.write_file(run_dir.summary_path.name, readable_json(summary))
    say(f"nothing to draw: {progress}")
    say(str(run_dir.path), sys.stdout)
    return EXIT_OK


def _status(file: Inside) -> str | None:
    """What a summary.json says of its run; None where it cannot be read."""
    try:
        return json.loads(file.read_bytes())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
