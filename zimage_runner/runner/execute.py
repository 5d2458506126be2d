"""From a composed config to a finished run: plan, open the run directory, draw, report. No Hydra, no torch.

The way to the model: ``execute``, ``Run.draw`` (run.py), ``GenerationLoop.draw`` (loop.py), ``Lease.run`` (pool.py),
``InlineExecutor.run``, ``MemoryBackoff.run``, ``Session.generate``, the engine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from concurrent.futures import Future
from pathlib import Path

from zimage_runner.config.schema import Composed, RunConfig
from zimage_runner.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_ITEMS_FAILED,
    EXIT_OK,
    NO_HOME,
    RunStopped,
    UserError,
    error_text,
    is_homeless,
    is_refused,
)
from zimage_runner.logs import refuse, run_log, say, use_format
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.config import Fsync
from zimage_runner.outputs.item_files import copy_to, files_of
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import SHARDS, picture_at
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.summary import Summary
from zimage_runner.outputs.survey import Progress, survey
from zimage_runner.runner.dry_run import describe
from zimage_runner.runner.pool import SharedExecutor, executor_of_run
from zimage_runner.runner.reuse import check_earlier_runs, drawn_before
from zimage_runner.runner.run import Run
from zimage_runner.runner.spec import RunSpec, plan_run
from zimage_runner.signals import PATIENCE

log = logging.getLogger(__name__)


def execute(composed: Composed) -> int | Future[int]:
    """Do one run. Return its exit code; within a multirun perhaps a future, which is done when the multirun is.

    What the user can mend is said in one line on stderr.
    """
    use_format(composed.config.log.format)
    try:
        with executor_of_run() as shared:
            spec = _plan(composed.config, shared)
            if composed.config.dry_run:
                return _describe(spec, composed.directory, shared)
            with contextlib.ExitStack() as held:
                run_dir = held.enter_context(_open(composed.config, composed.directory))
                ledger = Ledger.load(run_dir.records_path)
                progress = progress_of(spec, run_dir.path, ledger)
                if not progress.todo and composed.config.resume is not None:
                    shared.finish_previous()
                    return _nothing_to_draw(spec, run_dir, ledger, progress)
                if composed.config.skip_existing is not None:
                    check_earlier_runs(composed.config.skip_existing, run_dir.path)
                run_dir.check_space([(i.params.height, i.params.width) for i in progress.todo], composed.config.output)
                with shared.lease(spec) as lease, run_log(run_dir.log_path):
                    run = Run(spec, run_dir, ledger, progress, lease)
                    run.draw(composed.files)
                return shared.finish(lease, functools.partial(_report, run, held.pop_all()))
    except (UserError, RunStopped) as error:  # here and not in main: Hydra would print a line of its own
        return refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if is_homeless(error):
            return refuse(f"a path begins with ~, and {NO_HOME}")
        if not is_refused(error):
            raise
        return refuse(f"{error_text(error)}: nothing was started: raise the limit (ulimit -u, ulimit -v) and try again")
    finally:
        composed.remove_unused_directory()


def _plan(config: RunConfig, shared: SharedExecutor) -> RunSpec:
    """Plan the run, where it may while the GPU draws the previous run's last images."""
    with shared.stop.interruptible(PATIENCE):  # it may download and hash gigabytes
        spec = plan_run(config, shared.memo)
    if config.dry_run or config.skip_existing is not None or config.output_file is not None:
        shared.finish_previous()  # it may have what this run skips, it may write that file too
    return spec


def _describe(spec: RunSpec, directory: Path, shared: SharedExecutor) -> int:
    """Print what the run would do. Return the exit code."""
    progress = progress_of(spec, directory, Ledger.load(directory / RECORDS))
    linked = drawn_before(spec, progress.todo)
    shared.planned.append(len(progress.todo) - len(linked))
    if shared.label:
        say(f"{shared.label}:", sys.stdout)
    return EXIT_OK if say(describe(spec, progress, linked), sys.stdout) else EXIT_BAD_INPUT


def _report(run: Run, held: contextlib.ExitStack) -> int:
    """End a run; ``held`` keeps its run directory open. Return the exit code.

    Whatever goes wrong is this run's own affair: the next one may be drawing already.
    """
    with held, run_log(run.run_dir.log_path):
        try:
            return run.report()
        except (UserError, RunStopped) as error:
            return refuse(f"{run.run_dir.path}: {error}")
        except Exception as error:
            log.error("%s: %s", run.run_dir.path, error_text(error), exc_info=error)
            return EXIT_ITEMS_FAILED


def _nothing_to_draw(spec: RunSpec, run_dir: RunDirectory, ledger: Ledger, progress: Progress) -> int:
    """Say so. Return the exit code.

    A process that was killed before its run's end has left no summary, or the one of an earlier end.
    """
    try:
        _finish_shards(spec, run_dir, ledger, complete=not progress.skipped)
    except RunStopped as error:
        refuse(str(error))
        return EXIT_INTERRUPTED
    summary = Summary(run_dir.path, planned=len(spec.plan), already_done=len(progress.done)).to_dict({})
    if not progress.skipped and _status(Inside(run_dir.path, run_dir.summary_path.name)) != summary["status"]:
        run_dir.write_file(run_dir.summary_path.name, readable_json(summary))
    if (target := spec.output_file) is not None and progress.done:
        item_dir = next(iter(progress.done))
        entry = ledger.entries[item_dir]
        picture = picture_at(run_dir.path, item_dir, entry.image, entry.size, entry.place)
        _put_again(picture, target, sync=spec.config.output.fsync is Fsync.item)
    say(f"nothing to draw: {progress}")
    say(str(run_dir.path), sys.stdout)
    return EXIT_INTERRUPTED if progress.skipped else EXIT_OK


def _finish_shards(spec: RunSpec, run_dir: RunDirectory, ledger: Ledger, *, complete: bool) -> None:
    """Finish and upload what a process that was killed at its end has left. Raises RunStopped."""
    if not os.path.lexists(run_dir.path / SHARDS):
        return
    files = files_of(run_dir, spec.config.output, thumbnails=False)
    try:
        with contextlib.closing(ledger.open(run_dir.dir_fd)):
            files.end(ledger, complete=complete)
    except OSError as error:
        raise atomic.disk_error(error, str(run_dir.path)) from error


def _put_again(source: Inside, target: Path, *, sync: bool) -> None:
    """Put a run's single picture at ``output_file``, where it may never have been. Raises DiskError."""
    try:
        picture = source.read_bytes()
        if not target.is_file() or target.read_bytes() != picture:
            copy_to(target, picture, sync=sync)
    except OSError as error:
        raise atomic.disk_error(error, str(target)) from error


def _status(file: Inside) -> str | None:
    """Return what a summary.json says of its run; None where it cannot be read."""
    try:
        return from_json(file.read_bytes())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(config: RunConfig, directory: Path) -> RunDirectory:
    return RunDirectory.create(directory) if config.resume is None else RunDirectory.resume(directory)


def progress_of(spec: RunSpec, directory: Path, ledger: Ledger) -> Progress:
    """Return what earlier processes did of the plan; nothing unless the run is resumed."""
    if spec.config.resume is None:
        return Progress(todo=spec.plan.items)
    return survey(directory, ledger, spec.plan.items, verify=spec.config.verify, retry=spec.config.retry)
