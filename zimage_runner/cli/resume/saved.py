"""What an earlier run was started with, as Hydra left it in its directory."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_runner.cli.foreign import names_own_field
from zimage_runner.cli.interpolation import looks_up
from zimage_runner.cli.words import names_config_dir
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import UserError, one_line
from zimage_runner.logs import say
from zimage_runner.outputs.beneath import Inside, NotPlain
from zimage_runner.outputs.parsed import from_yaml

SETTINGS = ".hydra/overrides.yaml"
CONFIGS = ".hydra/configs"
"""Copies of the user's own config files, so that they may be edited or gone when the run or multirun is resumed."""
OF_THIS_PROCESS = ("resume", "retry", "verify", "dry_run")
"""Fields that belong to one process, not to the run."""
_OPTION = re.compile(r"\w[\w+-]*(?:\.\w[\w+-]*)*(?:/\w[\w+-]*)*")
"""An option's name, without dots that lead out of its group's folder."""


def override_key(override: str) -> str:
    """``+experiment`` and ``experiment=x`` are one key."""
    return override.partition("=")[0].lstrip("+~")


def saved_overrides(directory: Path) -> list[str]:
    """What the run was started with, and the option of every other group, in case the defaults have changed since.

    Experiments are left out: ``.hydra/config.yaml`` holds what they said. So is what the environment would be asked
    for. Raises UserError if the directory holds no run.
    """
    overrides = with_choices(directory, SETTINGS, read_yaml(directory, SETTINGS), saved_runtime(directory))
    return [entry for entry in overrides if root_of(entry) != "experiment" and not looks_up(entry)]


def with_choices(directory: Path, name: str, overrides: Any, runtime: Any) -> list[str]:
    """Overrides of our own fields as read from the file ``name``, with the other groups' options of ``hydra.runtime``.

    A saved run is data: of its overrides those that set a field or choose a group of the run are taken, no others.
    """
    overrides = [entry for entry in texts(directory, name, overrides) if is_own(entry)]
    given = {override_key(entry) for entry in overrides}
    chosen = _entry(runtime, "choices", {})
    if "experiment" in given and isinstance(chosen, dict) and "experiment" not in chosen:
        chosen = {}  # a sweep over experiments, each with options of its own
    choices = [
        f"{group}={option}"
        for group, option in (chosen.items() if isinstance(chosen, dict) else ())
        if group in _groups() and group not in given and isinstance(option, str) and _OPTION.fullmatch(option)
    ]
    return [*choices, *(entry for entry in overrides if override_key(entry) not in OF_THIS_PROCESS)]


def refuse_ignored_choices(
    directory: Path, said: Collection[str], typed: Collection[str], chosen: Mapping[str, object]
) -> None:
    """Raise UserError if experiments of the command line choose another option of a group than the run began with.

    ``said``: their ``group=option``, among fields. ``typed``: groups and fields on the command line. ``chosen``: the
    options that are in force, which are the run's. What was typed when the run began stays as it was typed.
    """
    then = {override_key(entry) for entry in texts(directory, SETTINGS, read_yaml(directory, SETTINGS))}
    for group, _, option in (entry.partition("=") for entry in said):
        known = group in _groups() and group not in ("prompts", *then, *typed) and option
        if known and chosen.get(group, option) != option:
            raise UserError(
                f"resume={directory}: the experiment chooses {group}={option} now, and the run was begun with "
                f"{group}={chosen[group]}: put that back, or write {group}=... on the command line"
            )


def without_replaced(saved: Sequence[str], others: Sequence[str]) -> list[str]:
    """The saved overrides without the fields of options in whose place ``others`` choose another one; told."""
    options = {override_key(entry): entry.partition("=")[2] for entry in others}
    was = {override_key(entry): entry.partition("=")[2] for entry in saved}
    groups = [group for group in _groups() if group in options and options[group] != was.get(group)]
    gone = [entry for entry in saved if override_key(entry).partition(".")[0] in groups and "." in override_key(entry)]
    for group in groups:
        names = [override_key(entry) for entry in gone if override_key(entry).startswith(f"{group}.")]
        if names:
            old = f"{group}={was[group]}" if group in was else "what the run had"
            say(f"{group}={options[group]} replaces {old}: left out {', '.join(names)} of the earlier run")
    return [entry for entry in saved if entry not in gone]


def texts(directory: Path, name: str, overrides: Any) -> list[str]:
    """The list of overrides that the file ``name`` holds. Raises UserError if it is none."""
    if not isinstance(overrides, list) or not all(isinstance(entry, str) for entry in overrides):
        raise UserError(f"resume={directory}: {name} holds no list of overrides")
    return overrides


def root_of(override: str) -> str:
    """Field or group that an override is about: ``model`` of ``++model.dtype=float32``."""
    return re.split(r"[./@:]", override_key(override), maxsplit=1)[0]


def is_own(override: str) -> bool:
    """Whether an override sets one of the run's own fields or chooses one of its groups, or an experiment."""
    return names_own_field(override.partition("=")[0]) and root_of(override) in _fields()


def tell_what_is_left_out(directory: Path, overrides: list[str]) -> None:
    """Say which saved overrides are not taken, because they could make Hydra run code or are no fields of a run."""
    if overrides:
        names = ", ".join(dict.fromkeys(entry.partition("=")[0] for entry in overrides))
        say(f"resume={directory}: left out of its saved settings: {one_line(names, 1000)} (give them again if wanted)")


def choices_of_others(choices: Sequence[str]) -> bool:
    """Whether a ``group=option`` among the overrides is not in the package's own ``conf/``."""
    pairs = [entry.partition("=") for entry in choices]
    return any(
        group in _groups() and not (CONFIG_DIR / group / f"{option}.yaml").is_file() for group, _, option in pairs
    )


def _groups() -> Collection[str]:
    from zimage_runner.config.registry import SCHEMAS

    return SCHEMAS


def _fields() -> set[str]:
    from zimage_runner.config.schema import RunConfig

    return {"experiment", *(field.name for field in dataclasses.fields(RunConfig))}


def saved_runtime(directory: Path) -> Any:
    """``hydra.runtime`` as it was when the run began; None where it cannot be told."""
    return _entry(_entry(read_yaml(directory, ".hydra/hydra.yaml"), "hydra"), "runtime")


def is_started_again(directory: Path, job_id: str | None) -> bool:
    """Whether this process is a job of submitit's that was started in this directory before.

    Slurm, or submitit itself, begins a job anew under its old number after it was pre-empted or its time was up.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or not os.path.lexists(directory / SETTINGS):
        return False
    job = _entry(_entry(read_yaml(directory, ".hydra/hydra.yaml"), "hydra"), "job")
    return job_id is not None and _entry(job, "id") == job_id


def config_dirs(directory: Path, runtime: Any, others: Sequence[str]) -> list[str]:
    """--config-dir of the run's own copies, unless given again; where it has none, the folder that it was started with.

    Raises UserError if there is a link among the copies.
    """
    if names_config_dir(others):
        return []
    folder = directory / CONFIGS
    if os.path.lexists(folder):
        for path in (folder.parent, folder, *folder.rglob("*")):
            if path.is_symlink():
                raise UserError(f"resume={directory}: {path.relative_to(directory)} is a link: put a plain file there")
        return [f"--config-dir={folder}"]
    sources = _entry(runtime, "config_sources", [])
    sources = sources if isinstance(sources, list) else []
    paths = [str(_entry(source, "path", "")) for source in sources if _entry(source, "provider") == "command-line"]
    return [f"--config-dir={paths[0]}"] if paths else []


def read_yaml(directory: Path, name: str) -> Any:
    """A file of the run. Raises UserError saying what the directory is instead of a run."""
    try:
        return from_yaml(Inside(directory, name).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a directory" if not directory.is_dir() else f"holds no run (no {name} in it)"
        below = itertools.chain(directory.glob(f"*/{SETTINGS}"), directory.glob(f"*/*/{SETTINGS}"))
        newest = max(below, key=lambda path: path.stat().st_mtime, default=None)
        hint = "" if newest is None else f"; the newest below it is {newest.parents[1]}"
        raise UserError(f"resume={directory} {what}: give the run directory that the first run printed{hint}") from None
    except NotPlain as error:
        raise UserError(f"resume={directory}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"resume={directory}: {name} cannot be read: {error}") from None


def _entry(mapping: Any, name: str, default: Any = None) -> Any:
    return mapping.get(name, default) if isinstance(mapping, dict) else default
