"""``hydra/launcher=warm``: all jobs of a multirun in this process, sharing sessions.

Jobs that need the same session run one after the other, whatever order the sweeper gave; each keeps its own number
and directory.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from zimage_runner.cli.layers import files_read
from zimage_runner.cli.messages import CONFIG_ERRORS
from zimage_runner.cli.resume.jobs import check_unchanged, keep_config_files, keep_jobs
from zimage_runner.cli.resume.sweep import job_to_resume, keep_first_settings
from zimage_runner.cli.sweep.composer import compose_quickly
from zimage_runner.cli.sweep.report import exit_codes, known_code, split_overrides
from zimage_runner.collect.overrides import varying_fields
from zimage_runner.config.schema import PLUGIN_MODULE
from zimage_runner.errors import EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, UserError, counted, error_text, one_line
from zimage_runner.logs import refused_before, say
from zimage_runner.outputs.summary import resume_command
from zimage_runner.outputs.survey import Retry
from zimage_runner.signals import graceful_stop

if TYPE_CHECKING:
    from zimage_runner.runner.pool import SharedExecutor

log = logging.getLogger(__name__)

COMPLAINTS_TOLD = 10
LONGEST_VALUE = 40
"""Characters of a value on the terminal."""


class WarmLauncher(Launcher):
    """Hydra calls ``setup`` and then ``launch`` for each batch of jobs of its sweeper."""

    __module__ = PLUGIN_MODULE

    def __init__(self, keep_going: bool = True) -> None:
        self.keep_going = keep_going

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config
        self.composer = compose_quickly(hydra_context.config_loader)
        self.signal_name: str | None = None
        """What ended an earlier batch of this multirun: its sweeper may come with more."""
        self.told: dict[int, str] = {}
        """Numbers of jobs of which it was said why they will be refused."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; their returns in the order given."""
        from zimage_runner.runner.pool import shared_executor

        setup_globals()
        directory = Path(str(self.config.hydra.sweep.dir))
        directory.mkdir(parents=True, exist_ok=True)
        if self.config.resume is None:
            keep_first_settings(directory)
        configs = [self._compose(list(o), initial_job_idx + n) for n, o in enumerate(job_overrides)]
        if self.config.resume is not None:
            check_unchanged(directory, [c for c in configs if c.resume is None and c.retry is not Retry.failed])
        else:
            if not self.config.dry_run:
                keep_jobs(directory, configs)
                keep_config_files(directory, files_read)
            self._tell_complaints(configs)
        labels = job_labels(job_overrides, initial_job_idx)
        returns: dict[int, JobReturn] = {}
        with graceful_stop() as stop, shared_executor(stop, overlaps=self.keep_going) as executor:
            if self.signal_name is not None:
                stop.set(self.signal_name)
            for n in warm_order(configs):
                executor.label = labels[n]
                returns[n] = self._run(configs[n], executor)
                if not self.keep_going and returns[n].return_value:
                    log.warning("job %d failed: the jobs after it are not run (keep_going=false)", initial_job_idx + n)
                    break
            if executor.planned:
                jobs, pictures = counted(len(executor.planned), "job"), counted(sum(executor.planned), "picture")
                say(f"{jobs}, {pictures} to draw in all", sys.stdout)
        for result in returns.values():
            result.return_value = known_code(result.return_value)
        if stop and self.signal_name is None:
            self.signal_name = stop.signal_name
            say(f"to finish the whole multirun: {resume_command(directory.absolute())}")
        return [returns.get(n) or _not_run(EXIT_ITEMS_FAILED) for n in range(len(configs))]

    def _tell_complaints(self, configs: Sequence[DictConfig]) -> None:
        from zimage_runner.cli.sweep.check import complaints

        found = list(complaints(configs))
        for number, why in found[:COMPLAINTS_TOLD]:
            log.warning("job %d will be refused: %s", number, why)
            self.told[number] = why
        if len(found) > COMPLAINTS_TOLD:
            log.warning("%s in all will be refused", counted(len(found), "job"))

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.composer.take(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        if config.resume is not None:  # the whole multirun's directory
            config.resume = job_to_resume(_directory(config))
            config.verify = config.verify and config.resume is not None
        return config

    def _run(self, config: DictConfig, executor: SharedExecutor) -> JobReturn:
        """One job. What it raises is reported here: raised to Hydra it would end the sweep."""
        if executor.stop:
            return _not_run(EXIT_INTERRUPTED)
        if self.config.resume is not None:
            retry_failed = config.resume is None and config.retry is Retry.failed
            what = "is continued" if config.resume else "was never begun"
            what += " and left alone (retry=failed)" if retry_failed else "" if config.resume else ": it starts now"
            if retry_failed or not config.dry_run:
                say(f"job {config.hydra.job.num} {what} ({_directory(config)})")
            if retry_failed:
                return _not_run(EXIT_ITEMS_FAILED)
        heard = refused_before.set(self.told.get(config.hydra.job.num))
        try:
            result = run_job(
                task_function=self.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=self.hydra_context,
                configure_logging=False,
            )
        except KeyboardInterrupt:  # while it got ready
            if not executor.stop:
                raise
            return _not_run(EXIT_INTERRUPTED)
        finally:
            refused_before.reset(heard)
        if result.status is JobStatus.FAILED:
            error = result._return_value
            executor.close()  # whatever state it is in
            log.error("job %d: %s", config.hydra.job.num, error_text(error), exc_info=error)
            result.status, result.return_value = JobStatus.COMPLETED, EXIT_ITEMS_FAILED
        return result


def _directory(config: DictConfig) -> Path:
    return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)


def _not_run(code: int) -> JobReturn:
    exit_codes.append(code)  # Hydra tells no callback of it
    result = JobReturn()
    result.status, result.return_value = JobStatus.COMPLETED, code
    return result


def job_labels(job_overrides: Sequence[Sequence[str]], first: int) -> list[str]:
    """``job 3 (seeds=2, sampling.num_inference_steps=4)``: number, and what differs between jobs."""
    jobs = [split_overrides(overrides) for overrides in job_overrides]
    fields, labels = varying_fields(jobs), []
    for number, overrides in enumerate(jobs, first):
        swept = ", ".join(f"{name}={one_line(overrides.get(name, ''), LONGEST_VALUE)}" for name in fields)
        labels.append(f"job {number} ({swept})" if swept else f"job {number}")
    return labels


def warm_order(configs: Sequence[DictConfig]) -> list[int]:
    """Return positions such that jobs of one session stand together: sessions by first appearance, jobs as given."""
    first: dict[str, int] = {}
    keys = [first.setdefault(_session_of(config, n), n) for n, config in enumerate(configs)]
    return sorted(range(len(configs)), key=lambda n: keys[n])


def _session_of(config: DictConfig, position: int) -> str:
    """Return a key that is equal for jobs that can share a session. A job that will be refused shares none."""
    from zimage_runner.cli.sweep.check import typed_run
    from zimage_runner.runner.spec import executor_key

    try:
        return executor_key(typed_run(config))
    except (UserError, *CONFIG_ERRORS):
        return f"refused {position}"


def register_launcher() -> None:
    """Tell Hydra of the plugin; harmless when called twice."""
    from hydra.core.plugins import Plugins

    Plugins.instance().register(WarmLauncher)  # scans the installed plugins first
    package, _, name = PLUGIN_MODULE.partition(".")
    try:
        parent = importlib.import_module(package)
    except ImportError:
        parent = sys.modules[package] = ModuleType(package)
    module = sys.modules[PLUGIN_MODULE] = ModuleType(PLUGIN_MODULE)
    module.WarmLauncher = WarmLauncher  # pyright: ignore[reportAttributeAccessIssue]
    setattr(parent, name, module)
