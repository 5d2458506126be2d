"""``resume=DIR`` on the command line: the earlier run's own overrides, then what the user adds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from zimage_runner.config.free_text import hydra_quote, is_multirun
from zimage_runner.errors import UserError

_RESUME = re.compile(r"\+{0,2}resume=(?P<value>.*)", re.S)
LATEST = "latest"


def resume_command_line(argv: Sequence[str]) -> list[str]:
    """``argv`` itself, or with ``resume=DIR`` the command line that composes that run's config in its directory."""
    asked = [match["value"] for arg in argv if (match := _RESUME.fullmatch(arg))]
    if not asked or asked[-1] in ("", "null"):
        return list(argv)
    if is_multirun(argv):
        raise UserError("resume cannot be combined with --multirun: resume one job's directory at a time")
    others = [arg for arg in argv if not _RESUME.fullmatch(arg)]
    value = _unquote(asked[-1])
    directory = find_latest(_root(others)) if value == LATEST else Path(value).expanduser().absolute()
    saved = saved_overrides(directory)
    mine = {override_key(arg) for arg in others}
    kept = [override for override in saved if override_key(override) not in mine]
    quoted = hydra_quote(str(directory))
    return [*_config_dirs(directory, others), *kept, *others, f"resume={quoted}", f"hydra.run.dir={quoted}"]


def override_key(override: str) -> str:
    """``+experiment`` and ``experiment=x`` are one key."""
    return override.partition("=")[0].lstrip("+~")


def saved_overrides(directory: Path) -> list[str]:
    """What the run was started with, and the option of every other group, in case the defaults have changed since.

    Raises UserError if the directory holds no run.
    """
    value = _read_yaml(directory, "overrides.yaml")
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"resume={directory}: .hydra/overrides.yaml is not a list of overrides")
    given = {override_key(entry) for entry in value}
    choices = [
        f"{group}={option}"
        for group, option in _runtime(directory, "choices", {}).items()
        if group.isidentifier() and group not in given and group != "experiment" and isinstance(option, str)
    ]
    return [
        *choices,
        *(entry for entry in value if override_key(entry) not in ("resume", "retry", "verify", "dry_run")),
    ]


def _config_dirs(directory: Path, others: Sequence[str]) -> list[str]:
    """--config-dir of the first run, unless given again: experiments of the user's own live there."""
    if any(arg == "-cd" or arg.startswith("--config-dir") for arg in others):
        return []
    sources = _runtime(directory, "config_sources", [])
    paths = [source["path"] for source in sources if source.get("provider") == "command-line"]
    return ["--config-dir", paths[0]] if paths else []


def _runtime(directory: Path, name: str, default: Any) -> Any:
    """An entry of ``hydra.runtime`` as it was when the run began."""
    try:
        return _read_yaml(directory, "hydra.yaml")["hydra"]["runtime"][name]
    except (KeyError, TypeError):
        return default


def _read_yaml(directory: Path, name: str) -> Any:
    try:
        return yaml.safe_load((directory / ".hydra" / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (directory / "multirun.yaml").is_file():
            raise UserError(
                f"resume={directory} is a multirun: resume its jobs one by one: {directory}/0 ..."
            ) from None
        what = "is not a directory" if not directory.is_dir() else f"holds no run (no .hydra/{name} in it)"
        raise UserError(f"resume={directory} {what}: give the run directory that the first run printed") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"resume={directory}: .hydra/{name} cannot be read: {error}") from None


def _root(argv: Sequence[str]) -> Path:
    roots = [arg.partition("=")[2] for arg in argv if override_key(arg) == "output.root"]
    return Path(_unquote(roots[-1]) if roots else "outputs").expanduser()


def find_latest(root: Path) -> Path:
    """The run directory that was started last below the output root, jobs of multiruns included."""
    pattern = ".hydra/overrides.yaml"
    found = [*root.glob(f"*/*/{pattern}"), *root.glob(f"multirun/*/*/*/{pattern}")]
    if not found:
        raise UserError(f"resume=latest: there is no run in {root.absolute()}: set output.root to where runs are")
    newest = max(found, key=lambda path: (os.stat(path).st_mtime_ns, str(path)))
    return newest.parent.parent.absolute()


def _unquote(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'" else value
