"""What each job of a multirun was going to draw when the multirun began, for jobs that begin when it is resumed.

Config files and prompt files may have been edited since; a table of old and new pictures would not say so.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zimage_runner.cli.resume.saved import CONFIGS
from zimage_runner.cli.resume.settings import changed_fields, leaves
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.digest import sha256_of
from zimage_runner.prompts.images import files_below
from zimage_runner.sampling import PICTURE_FILES

JOBS = ".hydra/jobs.jsonl"


def keep_jobs(directory: Path, configs: Sequence[DictConfig]) -> None:
    """Write a line for each job that begins now; a sweeper may come with more of them later."""
    described = [_described(config) for config in configs]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in described if entry is not None]
    with atomic.directory(directory) as folder:
        beneath.make_dirs(folder, str(PurePosixPath(JOBS).parent))
        before = Inside(directory, JOBS).read_bytes() if (directory / JOBS).is_file() else b""
        atomic.write_file(folder, JOBS, before + "".join(f"{line}\n" for line in lines).encode())


def keep_config_files(directory: Path, files: Mapping[str, Path]) -> None:
    """Copy config files, given by their names below the config folder; those that are kept already stay as they are."""
    with atomic.directory(directory) as folder:
        for name, file in files.items():
            kept = f"{CONFIGS}/{name}"
            if not os.path.lexists(directory / kept):
                beneath.make_dirs(folder, str(PurePosixPath(kept).parent))
                atomic.write_file(folder, kept, file.read_bytes())


def check_unchanged(directory: Path, configs: Sequence[DictConfig]) -> None:
    """Raise UserError if a job among ``configs`` would draw something else than when the multirun began."""
    began = _read(directory)
    for config in configs:
        number = config.hydra.job.num
        was, now = began.get(number), _described(config)
        if was is None or now is None:
            continue
        for field in ("prompts.path", *(f"sampling.{name}" for name in PICTURE_FILES)):
            old, new = was["config"].get(field), now["config"].get(field)
            is_same = old != new and old in was["files"] and was["files"][old] == now["files"].get(new)
            if is_same and (field != "prompts.path" or _means_the_same(old, new, config)):
                was["config"][field], was["files"][new] = new, was["files"].pop(old)  # the same file under another path
        changes = changed_fields(was["config"], now["config"])
        for file in sorted({*was["files"], *now["files"]}):
            if was["files"].get(file) != now["files"].get(file):
                what = (
                    "is gone" if file not in now["files"] else "is new" if file not in was["files"] else "has changed"
                )
                changes.append(f"{file} {what}")
        if changes:
            raise UserError(
                f"resume={directory}: job {number} was never begun, and would not draw what it was to draw when the "
                f"multirun began: {'; '.join(changes)}: put that back, or start a new multirun"
            )


def _means_the_same(old: str, new: str, config: DictConfig) -> bool:
    """Whether a prompt file that has moved names no pictures by paths beside it: there may be others here."""
    from zimage_runner.cli.sweep.check import typed_run
    from zimage_runner.prompts.select import read_prompts

    folders = {os.path.dirname(os.path.abspath(os.path.expanduser(path))) for path in (old, new)}
    return len(folders) == 1 or not any(
        not prompt.overrides.keys().isdisjoint(PICTURE_FILES) for prompt in read_prompts(typed_run(config).prompts)
    )


def _described(config: DictConfig) -> dict[str, Any] | None:
    """Number, settings and prompt files of a job; None for one that will be refused."""
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        settings = json.loads(json.dumps(dict(leaves(own)), default=str))
    except OmegaConfBaseException:
        return None
    files = {path: sha256_of(os.path.expanduser(path)) for path in _prompt_files(settings)}
    return {"num": config.hydra.job.num, "config": settings, "files": files}


def _prompt_files(settings: dict[str, Any]) -> list[str]:
    path, pattern = settings.get("prompts.path"), settings.get("prompts.glob")
    found = [path] if isinstance(path, str) else []
    if found and os.path.isdir(folder := os.path.expanduser(found[0])):
        found = files_below(Path(folder))
    found += sorted(glob.glob(os.path.expanduser(pattern), recursive=True)) if isinstance(pattern, str) else []
    named = (settings.get(f"sampling.{name}") for name in PICTURE_FILES)
    found += [name for name in named if isinstance(name, str)]
    return [file for file in found if os.path.isfile(os.path.expanduser(file))]


def _read(directory: Path) -> dict[int, dict[str, Any]]:
    """The lines by number; nothing for a multirun of an earlier version."""
    try:
        lines = Inside(directory, JOBS).read_bytes().decode().splitlines()
        return {entry["num"]: entry for entry in map(json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"resume={directory}: {JOBS} cannot be read: {error}") from None
