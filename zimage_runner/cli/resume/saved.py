"""What an earlier run was started with, as Hydra left it in its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from zimage_runner.errors import UserError
from zimage_runner.outputs.beneath import Inside, NotPlain

SETTINGS = ".hydra/overrides.yaml"
OF_THIS_PROCESS = ("resume", "retry", "verify", "dry_run")
"""Fields that belong to one process, not to the run."""


def override_key(override: str) -> str:
    """``+experiment`` and ``experiment=x`` are one key."""
    return override.partition("=")[0].lstrip("+~")


def saved_overrides(directory: Path) -> list[str]:
    """What the run was started with, and the option of every other group, in case the defaults have changed since.

    Raises UserError if the directory holds no run.
    """
    overrides = read_yaml(directory, SETTINGS)
    return with_choices(directory, SETTINGS, overrides, saved_runtime(directory))


def with_choices(directory: Path, name: str, overrides: Any, runtime: Any) -> list[str]:
    """Overrides as read from the file ``name``, with the other groups' options of ``hydra.runtime``."""
    if not isinstance(overrides, list) or not all(isinstance(entry, str) for entry in overrides):
        raise UserError(f"resume={directory}: {name} holds no list of overrides")
    given = {override_key(entry) for entry in overrides}
    choices = [
        f"{group}={option}"
        for group, option in _entry(runtime, "choices", {}).items()
        if group.isidentifier() and group not in given and group != "experiment" and isinstance(option, str)
    ]
    return [*choices, *(entry for entry in overrides if override_key(entry) not in OF_THIS_PROCESS)]


def saved_runtime(directory: Path) -> Any:
    """``hydra.runtime`` as it was when the run began; None where it cannot be told."""
    return _entry(_entry(read_yaml(directory, ".hydra/hydra.yaml"), "hydra"), "runtime")


def config_dirs(runtime: Any, others: Sequence[str]) -> list[str]:
    """--config-dir of the first run, unless given again: experiments of the user's own live there."""
    if any(arg == "-cd" or arg.startswith("--config-dir") for arg in others):
        return []
    sources = _entry(runtime, "config_sources", [])
    paths = [source["path"] for source in sources if source.get("provider") == "command-line"]
    return ["--config-dir", paths[0]] if paths else []


def read_yaml(directory: Path, name: str) -> Any:
    """A file of the run. Raises UserError saying what the directory is instead of a run."""
    try:
        return yaml.safe_load(Inside(directory, name).read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a directory" if not directory.is_dir() else f"holds no run (no {name} in it)"
        newest = max(directory.glob(f"*/{SETTINGS}"), key=lambda path: path.stat().st_mtime, default=None)
        hint = "" if newest is None else f"; the newest below it is {newest.parents[1]}"
        raise UserError(f"resume={directory} {what}: give the run directory that the first run printed{hint}") from None
    except NotPlain as error:
        raise UserError(f"resume={directory}: {error.strerror}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"resume={directory}: {name} cannot be read: {error}") from None


def _entry(mapping: Any, name: str, default: Any = None) -> Any:
    return mapping.get(name, default) if isinstance(mapping, dict) else default
