"""The command line: the only ``@hydra.main``, and what each exit code means.

0 all items done; 1 some items failed; 2 bad config or input, nothing started; 130 interrupted, resumable.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from zimage_runner.cli.foreign import TRUST, files_are_data
from zimage_runner.cli.hydra_patches import composed_once, copied_quickly, names_in_lists_are_refused, to_yaml
from zimage_runner.cli.interpolation import literal
from zimage_runner.cli.layers import files_read, later_choices_replace, said_by_experiments
from zimage_runner.cli.messages import CONFIG_ERRORS, explain, typed
from zimage_runner.cli.quoting import hints, quote_free_text
from zimage_runner.cli.resume.command_line import earlier_fields, resume_command_line
from zimage_runner.cli.resume.saved import is_started_again, override_key, refuse_ignored_choices, root_of
from zimage_runner.cli.resume.settings import restore
from zimage_runner.cli.resume.sweep import empty_if_unbegun
from zimage_runner.cli.sweep.launcher import register_launcher
from zimage_runner.cli.sweep.report import begun, exit_codes, known_code
from zimage_runner.cli.words import command_line_wins, names_config_dir, readable
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register
from zimage_runner.config.schema import Composed, RunConfig, ServeConfig
from zimage_runner.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_ITEMS_FAILED,
    EXIT_OK,
    PROGRAM,
    UserError,
    called,
)
from zimage_runner.executors.handing import HandOver, belongs_elsewhere
from zimage_runner.logs import LogFormat, log_to_terminal, refuse, say, use_format
from zimage_runner.outputs.run_dir import remove_if_empty

SERVE = "serve"
"""The primary config of the service, beside ``config``."""
_exit_codes: list[int | Future[int]] = []
"""One per job of this process, added when it starts to run: Hydra returns nothing from main."""


def _run_here(composed: Composed) -> int | Future[int]:
    check_place(composed)
    from zimage_runner.runner.execute import execute

    return execute(composed)


def check_place(composed: Composed) -> None:
    """Raise HandOver for a run that the resident process has to do."""
    if belongs_elsewhere(composed.config.executor, dry_run=composed.config.dry_run):
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError("executor=resident of a file: for a multirun put executor=resident on the command line")
        composed.remove_unused_directory()
        raise HandOver


_take: Callable[[Composed], int | Future[int]] = _run_here
"""What is done with a composed job."""
_serves = False
"""Whether the command line is the service's."""
_typed: frozenset[str] = frozenset()
"""Fields and groups on the command line itself, without those that come from a run that is resumed."""


def main(
    argv: Sequence[str], take: Callable[[Composed], int | Future[int]] = _run_here, *, serves: bool = False
) -> int:
    """Run one command line and return its exit code. Messages go to stderr, results to stdout.

    ``take`` gets each composed job: it runs it, or hands it to the process that will (head_start.py). ``serves``: the
    command line is the service's, and has fields of its own (conf/serve.yaml).
    """
    global _take, _serves, _typed
    _take, _serves = take, serves
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's own report and exit code 1
    _exit_codes.clear()
    exit_codes.clear()
    begun.clear()
    register()
    register_launcher()
    log_to_terminal()
    try:
        use_format(_format_of(argv))
        typed_words = readable([word for word in argv if word != TRUST])
        for hint in hints(typed_words):
            say(f"zimage_runner: {hint}")
        _typed = frozenset(override_key(word) for word in typed_words)
        words = quote_free_text(readable(resume_command_line(typed_words)))
        primary = [f"--config-name={SERVE}"] if serves else _without_server(words)
        sys.argv = [sys.argv[0], *primary, *words]
        own = names_config_dir(typed_words) or not names_config_dir(words)
        # Hydra prints --info through logging, which would tell of each line that `head` did not wait for.
        logging.raiseExceptions = not any(word.startswith(("--info", "-i")) for word in words)
        with (
            files_are_data(trusted=TRUST in argv, own=own),
            later_choices_replace(words, earlier_fields(typed_words, words)),
            composed_once(words),
            copied_quickly(),
            names_in_lists_are_refused(),
        ):
            job()
    except (UserError, *CONFIG_ERRORS, UnicodeDecodeError) as error:
        if _exit_codes and isinstance(error, UnicodeDecodeError):
            raise
        _exit_codes.append(refuse(explain(error)))
    except OSError as error:
        if _exit_codes:
            raise
        what = f"cannot make the run directory ({error}): set output.root to a directory you can write to"
        _exit_codes.append(refuse(what))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    _remove_what_never_began()
    return max([*map(known_code, _exit_codes), *exit_codes], default=EXIT_OK)


def _remove_what_never_began() -> None:
    """Remove what was made for a run or multirun that was refused or planned."""
    # Where a job ended here, those that were not run (keep_going=false) begin nowhere else.
    if {*map(known_code, _exit_codes or exit_codes)} <= {EXIT_OK, EXIT_BAD_INPUT}:
        _remove_if_unbegun()


def _remove_if_unbegun() -> None:
    for directory, there in begun:
        empty_if_unbegun(directory, is_new=there != directory)
        remove_if_empty(directory, there)


def _format_of(argv: Sequence[str]) -> LogFormat:
    """What the command line says of the log, for all that is told before there is a config."""
    said = [word.partition("=")[2] for word in argv if word.startswith("log.format=")]
    return LogFormat.json if said[-1:] == ["json"] else LogFormat.text


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def job(cfg: DictConfig) -> int | Future[int]:
    """Do one job: a single run, or one of a multirun's. Return its exit code, or the future of it, for launchers."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    number = len(_exit_codes)
    _exit_codes.append(EXIT_ITEMS_FAILED)  # unless it gets further
    code: int | Future[int] = EXIT_ITEMS_FAILED
    try:
        if HydraConfig.get().job.chdir:
            os.chdir(HydraConfig.get().runtime.cwd)
            raise UserError(
                "hydra.job.chdir=true: relative paths are read from where the program was started, and so are those of "
                "a run resumed: leave it out"
            )
        if HydraConfig.get().verbose:
            raise UserError(
                "hydra.verbose is not used: every run writes run.log, with all there is to say; leave it out"
            )
        overrides = list(HydraConfig.get().overrides.task)
        command_line_wins(cfg, overrides)
        job_id = OmegaConf.select(cast("DictConfig", HydraConfig.get()), "job.id")
        if cfg.resume is None and is_started_again(directory, job_id):
            cfg.resume = str(directory)
            overrides.append("resume")
        said: Collection[str] = ()
        if cfg.resume is not None:
            said = said_by_experiments if "experiment" in _typed else ()
            refuse_ignored_choices(directory, said, _typed, HydraConfig.get().runtime.choices)
            cfg = restore(cfg, directory, overrides, said)
        config = _validated(cfg)
        if config.resume is not None and "prompts" in map(root_of, (*_typed, *said)):
            from zimage_runner.runner.spec import check_same_prompts

            check_same_prompts(config, directory)
        composed = Composed(config=config, directory=directory, there=_there(directory), files=composed_files(cfg))
        gc.enable()  # paused while importing and composing, which leave no garbage
        code = _take(composed)
    except (UserError, *CONFIG_ERRORS) as error:  # here and not in main: Hydra would print a line of its own
        code = refuse(explain(error))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        code = refuse(f"{str(error.filename)[:60]}...: no file can have so long a name: is it a text?")
    finally:
        remove_if_empty(directory, _there(directory))
    _exit_codes[number] = code
    return code


def _there(directory: Path) -> Path:
    """The folder that was there before a job's directory; just the one above it if another process began the job."""
    return begun[0][1] if begun else directory.parent


def _validated(cfg: DictConfig) -> RunConfig:
    config = typed(cfg)
    assert isinstance(config, RunConfig)
    if isinstance(config, ServeConfig) and not _serves:
        raise UserError(f"--config-name={SERVE} is the service's: {called(PROGRAM)} serve ...")
    return config


def _without_server(words: Sequence[str]) -> tuple[()]:
    """Raise UserError for a field of the service on the command line of a run."""
    for word in words:
        if root_of(word) == "server" and "=" in word:
            raise UserError(f"{word.partition('=')[0]} is of the command serve: {called(PROGRAM)} serve {word}")
    return ()


def composed_files(cfg: DictConfig) -> dict[str, str]:
    """What Hydra leaves in ``.hydra/``: the config, its own settings and the overrides, as YAML texts,
    and the user's own config files that it was composed of.

    The config's interpolations are resolved: whoever resumes the run looks nothing up for it.
    """
    hydra_cfg = HydraConfig.get()
    return {
        "config.yaml": to_yaml(literal(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))),
        "hydra.yaml": to_yaml({"hydra": OmegaConf.to_container(hydra_cfg, resolve=False, enum_to_str=True)}),
        "overrides.yaml": to_yaml(hydra_cfg.overrides.task),
        **{f"configs/{name}": file.read_text(encoding="utf-8") for name, file in files_read.items()},
    }


def remove_unused_directory() -> None:
    """For a signal that ends the process: Hydra may just have made the run directory, or a multirun's."""
    with contextlib.suppress(Exception):
        _remove_if_unbegun()
        if HydraConfig.initialized():
            directory = Path(HydraConfig.get().runtime.output_dir)
            remove_if_empty(directory, _there(directory))
