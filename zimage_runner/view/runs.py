"""Which runs and multiruns lie below a folder, and what each was started with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zimage_runner.collect.overrides import overrides_by_field
from zimage_runner.errors import UserError
from zimage_runner.outputs.ledger import RECORDS
from zimage_runner.outputs.lock import LOCK_NAME
from zimage_runner.outputs.parsed import from_json, from_yaml, mapping
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.view.folder import Folder

PROMPTS = "prompts.jsonl"
SUMMARY = "summary.json"
SETTINGS = ".hydra/config.yaml"
OVERRIDES = ".hydra/overrides.yaml"
SWEEP = "multirun.yaml"
JOBS = ".hydra/jobs.jsonl"
DEEPEST = 8
"""Levels of folders that are searched for runs."""
LARGEST_SETTINGS = 8 << 20
LARGEST_RECORD = 4 << 20
LARGEST_JOBS = 64 << 20
NO_PARAMETERS = ("prompt", "prompts", "seeds", "name", "output", "hydra", "experiment", "resume", "retry", "verify",
                 "dry_run", "skip_existing", "output_file", "report")  # fmt: skip
"""Overrides that say what is drawn or where it goes, not how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A run directory below the folder."""

    path: str
    """Relative to the folder; empty when the folder is the run itself."""
    sweep: str | None = None
    """Path of the multirun that it is a job of."""
    number: int | None = None
    """The job's number in it."""


def named(word: str) -> str:
    """The folder that a word names; ``latest`` is the run or multirun below outputs/ started last. Raises UserError."""
    if word != "latest":
        return os.path.expanduser(word)
    from zimage_runner.cli.resume.command_line import folder_named  # it imports Hydra, which looking at runs needs not

    return str(folder_named(word))


def find_runs(root: str) -> Iterator[Found]:
    """Every run below ``root``, in the order of their names. Links are not followed, pictures not looked at."""
    yield from _search(root, "", 0, None)


def _search(root: str, path: str, depth: int, sweep: str | None) -> Iterator[Found]:
    try:
        with os.scandir(os.path.join(root, path)) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError:
        return  # gone meanwhile, or not ours to read
    if is_run(names):
        name = path.rpartition("/")[2]
        yield Found(path=path, sweep=sweep, number=int(name) if sweep is not None and name.isdecimal() else None)
        return
    if depth == DEEPEST:
        return
    inner = path if SWEEP in names else None
    for name in sorted((name for name, is_dir in names.items() if is_dir), key=_natural):
        if not name.startswith("."):
            yield from _search(root, f"{path}/{name}" if path else name, depth + 1, inner)


def is_run(names: Mapping[str, bool]) -> bool:
    """Whether a directory with these entries is a run's: it has a ledger, or is on its way to one."""
    return RECORDS in names or PROMPTS in names or (LOCK_NAME in names and SWEEP not in names)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() and len(name) < 10 else (1, 0, name)


@dataclass(kw_only=True, slots=True)
class Settings:
    """What a run was started with, as far as its files tell."""

    config: dict[str, Any]
    overrides: dict[str, str]
    """field -> value of the command line."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling fields, what is null filled in with the model's recommendation."""
        sampling = mapping(self.config.get("sampling"))
        recommended = mapping(mapping(self.config.get("model")).get("recommended"))
        return {key: recommended.get(key) if value is None else value for key, value in sampling.items()}

    @property
    def parameters(self) -> dict[str, Any]:
        """Choices of the command line beyond sampling: by these the jobs of a multirun may differ."""
        fields = self.overrides.items()
        return {key: value for key, value in fields if key.partition(".")[0] not in (*NO_PARAMETERS, "sampling")}

    def seeds_of(self, text: str) -> int:
        """How many pictures a prompt without seeds of its own gives; 0 if that cannot be told."""
        try:
            return len(parse_seeds(self.config.get("seeds")).for_text(text))
        except UserError:
            return 0

    def counter(self) -> Any:
        """``seeds_of`` for many prompts: the seeds are read once."""
        try:
            seeds = parse_seeds(self.config.get("seeds"))
        except UserError:
            return lambda text: 0
        return lambda text: len(seeds)


def read_settings(folder: Folder, run: str) -> Settings:
    """Settings of the run ``run``; what is missing or unreadable stays empty."""
    config = _yaml(folder, below(run, SETTINGS))
    overrides = _yaml(folder, below(run, OVERRIDES))
    texts = [text for text in overrides if isinstance(text, str)] if isinstance(overrides, list) else []
    return Settings(config=mapping(config), overrides=overrides_by_field(texts))


def jobs_in_all(folder: Folder, sweep: str) -> int:
    """How many jobs a multirun was started with, those not begun included; 0 where that cannot be told."""
    try:
        return folder.read(below(sweep, JOBS), LARGEST_JOBS).count(b"\n")
    except OSError:
        return 0


def read_json(folder: Folder, name: str, limit: int = LARGEST_RECORD) -> dict[str, Any]:
    """A JSON object of the run; empty where there is none that can be read."""
    try:
        return mapping(from_json(folder.read(name, limit)))
    except (OSError, ValueError):
        return {}


def below(run: str, name: str) -> str:
    """The path of a run's file; of the folder's own where the folder is the run."""
    return f"{run}/{name}" if run else name


def _yaml(folder: Folder, name: str) -> Any:
    try:
        return from_yaml(folder.read(name, LARGEST_SETTINGS))
    except (OSError, ValueError):
        return None
