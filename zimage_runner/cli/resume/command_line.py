"""``resume=DIR`` on the command line: the earlier run's or multirun's own overrides, then what the user adds.

``continue=DIR`` is the same where DIR holds a run, and else starts one there: one command line for both.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from zimage_runner.cli.quoting import hydra_quote, is_multirun
from zimage_runner.cli.resume.saved import (
    SETTINGS,
    choices_of_others,
    config_dirs,
    is_own,
    override_key,
    read_yaml,
    root_of,
    saved_overrides,
    saved_runtime,
    tell_what_is_left_out,
    texts,
    without_replaced,
)
from zimage_runner.cli.resume.sweep import (
    check_resumable,
    is_sweep,
    multirun_overrides,
    settings_file,
    sweep_command_line,
)
from zimage_runner.errors import UserError, counted
from zimage_runner.logs import say
from zimage_runner.outputs.run_dir import OWN_FILES, OWN_FOLDERS
from zimage_runner.prompts.text import unquoted

_RESUME = re.compile(r"\+{0,2}resume=(?P<value>.*)", re.S)
_CONTINUE = re.compile(r"\+{0,2}continue=(?P<value>.*)", re.S)
LATEST = "latest"


def resume_command_line(argv: Sequence[str]) -> list[str]:
    """``argv`` itself, or with ``resume=DIR`` the command line that composes that run's config in its directory."""
    argv = _resume_or_begin(argv)
    asked = [match["value"] for arg in argv if (match := _RESUME.fullmatch(arg))]
    if not asked or asked[-1] == "null":
        return list(argv)
    if not unquoted(asked[-1]).strip():
        raise UserError("resume='' is empty: give a run directory, or resume=latest")
    others = [arg for arg in argv if not _RESUME.fullmatch(arg)]
    value = unquoted(asked[-1])
    directory = find_latest(_root(others)) if value == LATEST else Path(value).expanduser().absolute()
    if is_sweep(directory):
        return sweep_command_line(directory, others)
    if is_multirun(argv):
        raise UserError(
            "resume cannot be combined with --multirun: give one run's directory without it, or a whole multirun's"
        )
    saved = saved_overrides(directory)
    tell_what_is_left_out(directory, [entry for entry in read_yaml(directory, SETTINGS) if not is_own(entry)])
    mine = {override_key(arg) for arg in others}
    kept = [override for override in without_replaced(saved, others) if override_key(override) not in mine]
    quoted = hydra_quote(str(directory))
    return [
        *(config_dirs(directory, saved_runtime(directory), others) if choices_of_others(kept) else ()),
        *kept,
        *others,
        f"resume={quoted}",
        f"hydra.run.dir={quoted}",
    ]


def earlier_fields(typed: Sequence[str], words: Sequence[str]) -> set[str]:
    """Fields and groups that ``words`` have from the run that is resumed, and over which a typed experiment wins.

    None of them where it is the run's own experiment: they were typed over it.
    """
    directory = next((unquoted(match["value"]) for word in words if (match := _RESUME.fullmatch(word))), "null")
    if directory == "null" or not (experiments := _experiments(typed)):
        return set()
    folder = Path(directory)
    task = multirun_overrides(folder) if is_sweep(folder) else texts(folder, SETTINGS, read_yaml(folder, SETTINGS))
    if experiments == _experiments(task):
        return set()
    return {override_key(word) for word in words if is_own(word)} - {override_key(word) for word in typed} - {"resume"}


def _experiments(overrides: Sequence[str]) -> list[str]:
    return [word.partition("=")[2].strip("[]") for word in overrides if root_of(word) == "experiment"]


def _resume_or_begin(argv: Sequence[str]) -> Sequence[str]:
    """``argv`` with ``continue=DIR`` replaced by ``resume=DIR``, or by the name of the directory to begin in."""
    asked = [match["value"] for arg in argv if (match := _CONTINUE.fullmatch(arg))]
    if not asked:
        return argv
    name = unquoted(asked[-1])
    if not name.strip() or name == LATEST:
        raise UserError(f"continue={name} names no directory: give the one that the run is, or shall be, in")
    others = [arg for arg in argv if not _CONTINUE.fullmatch(arg)]
    if any(_RESUME.fullmatch(arg) or override_key(arg) in ("hydra.run.dir", "hydra.sweep.dir") for arg in others):
        raise UserError(
            f"continue={name} says which run directory: leave out resume and hydra's run and sweep directory"
        )
    directory = Path(os.path.abspath(os.path.expanduser(name)))
    if os.path.lexists(directory / SETTINGS) or is_sweep(directory):
        if is_sweep(directory):
            others = [arg for arg in others if arg not in ("-m", "--multirun")]
        return [*others, f"resume={name}"]
    _check_free(name, directory)
    kind = "sweep" if is_multirun(argv) else "run"
    return [*others, f"hydra.{kind}.dir={hydra_quote(str(directory))}"]


def _check_free(name: str, directory: Path) -> None:
    """Raise UserError if what is there is neither a folder without files nor what a run that just began has left."""
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"continue={name} is no folder: give the one that the run is, or shall be, in")
    own = {*OWN_FILES, *OWN_FOLDERS}
    found = sorted(path.name for path in directory.glob("*") if path.name not in own and path.name[0] != ".")
    if not found:
        return
    runs = sorted(path for path in directory.glob("*") if os.path.lexists(path / SETTINGS) or is_sweep(path))
    names = itertools.chain(["all"], map(str, itertools.count(2)))
    free = next(new for new in names if not os.path.lexists(directory / new))
    remedy = f"continue={Path(name) / free} begins one in it"
    if runs:
        raise UserError(
            f"continue={name} is no run, but a folder of {counted(len(runs), 'run')}: "
            f"continue={Path(name) / runs[-1].name} goes on with the last one, {remedy}"
        )
    raise UserError(f"continue={name} is no run, and holds other things ({found[0]}): name a new folder; {remedy}")


def _root(argv: Sequence[str]) -> Path:
    roots = [arg.partition("=")[2] for arg in argv if override_key(arg) == "output.root"]
    return Path(unquoted(roots[-1]) if roots else "outputs").expanduser()


def folder_named(word: str) -> Path:
    """The folder that a word of a command on runs names; ``latest`` is the newest run or multirun below outputs/."""
    return find_latest(Path("outputs"), resumes=False) if word == LATEST else Path(word).expanduser()


def find_latest(root: Path, *, resumes: bool = True) -> Path:
    """The run or multirun that was started last below the output root; a job's start is its multirun's.

    ``resumes``: to resume it. A multirun is told of then; one that cannot be resumed whole gives its last job instead.
    """
    runs = [*root.glob(f"*/*/{SETTINGS}"), *root.glob(f"multirun/*/*/*/{SETTINGS}")]
    sweeps = [file for path in root.glob("multirun/*/*") if (file := settings_file(path)) is not None]
    if not runs and not sweeps:
        told, remedy = ("resume=latest", "set output.root to where runs are") if resumes else (LATEST, "name a run")
        raise UserError(f"{told}: there is no run in {root.absolute()}: {remedy}")
    directory = _newest([*runs, *sweeps])
    sweep = directory if is_sweep(directory) else directory.parent
    if not is_sweep(sweep):
        return directory
    if not resumes:
        return sweep
    jobs = [path for path in runs if path.parents[2].absolute() == sweep]
    try:
        check_resumable(sweep)
    except UserError as error:
        if not jobs:
            raise
        say(f"resume=latest: only the last job, {_newest(jobs)}, because {error}")
        return _newest(jobs)
    say(f"resume=latest: the whole multirun {sweep} ({len(jobs)} of its jobs were begun)")
    return sweep


def _newest(files: Sequence[Path]) -> Path:
    """The directory of the run or multirun whose settings were written last."""
    newest = max(files, key=lambda path: (os.stat(path).st_mtime_ns, str(path)))
    return (newest.parents[1] if newest.parent.name == ".hydra" else newest.parent).absolute()
