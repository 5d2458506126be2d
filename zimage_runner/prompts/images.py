"""Finished pictures as prompts: each one's text, seed and settings, read from its own metadata."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT, Convention
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.finished import Finished, shared_picture
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.place import ITEMS, RECORD, SHARDS
from zimage_runner.pictures.recorded import recorded_controlnet, recorded_values
from zimage_runner.prompts.base import INPUT, NOTHING, Prompt, RowSource, Wins
from zimage_runner.prompts.carried import carry
from zimage_runner.prompts.generation_data import (
    OWN_PROGRAM,
    GenerationData,
    has_infotext,
    of_comfyui,
    of_parameters,
)
from zimage_runner.prompts.loras import parse_loras
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.prompt import LoraWord
from zimage_runner.prompts.rows import SAMPLING_KINDS, check_id, convert, is_unset, seeds_of
from zimage_runner.prompts.text import check_text, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(kw_only=True, slots=True)
class Images(RowSource):
    """``prompts=images prompts.path=outputs/x seeds=0-3``: equal prompts and settings are one prompt."""

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    wins: Wins = Wins.command_line
    """Where a picture and the command line both set a sampling field or the seeds: command_line, or row."""
    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """A picture, or a folder with pictures at any depth: runs, multiruns, what collect made."""
    glob: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """Pattern, instead of path; ** descends into folders."""

    def read(self) -> Iterator[Prompt]:
        prompts: dict[object, Prompt] = {}
        moved = frozenset(self.typed if self.wins is Wins.command_line else ())
        for file in self._files():
            prompt = prompt_of_picture(file, moved=moved)
            seeds, same = prompt.seeds, replace(prompt, seeds=None, source="")
            said = repr((sorted(same.overrides.items()), same.loras, same.metadata))
            key = (same.text, same.id, seeds is None, said)
            first = prompts.setdefault(key, prompt)
            if first is not prompt and seeds and first.seeds:
                prompts[key] = replace(first, seeds=tuple(dict.fromkeys((*first.seeds, *seeds))))
        ids = Counter(prompt.id for prompt in prompts.values())
        for prompt in prompts.values():  # the same id may have been drawn in several ways
            yield replace(prompt, id=None) if ids[prompt.id] > 1 else prompt

    def _files(self) -> list[Path | Finished]:
        if (self.path is None) == (self.glob is None):
            problem = "is not set" if self.path is None else "and prompts.glob are both set"
            raise UserError(
                f"prompts.path {problem}: prompts=images needs prompts.path=PICTURE_OR_FOLDER, or "
                "prompts.glob='outputs/**/*.png'"
            )
        if self.path is not None:
            given = Path(self.path).expanduser()
            if not given.is_dir():
                return [(None if given.is_file() else shared_picture(given)) or given]
            found = sorted([*pictures_below(given), *finished_in_shards(given)], key=_path)
            if not found:
                raise UserError(f"prompts.path={self.path}: there is no picture (PNG, JPEG, WebP) in this folder")
            return found
        pattern = os.path.expanduser(self.glob or "")
        files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        pictures: list[Path | Finished] = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not pictures:
            folder = f": for a folder use prompts.path={self.glob}" if Path(pattern).is_dir() else ""
            raise UserError(
                f"prompts.glob={self.glob} matches no picture (PNG, JPEG, WebP){folder} (looked from {Path.cwd()})"
            )
        return pictures


def pictures_below(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[Path]:
    """Pictures at any depth; of runs and multiruns their items only, not the grids."""
    for name, folders, files in os.walk(folder):
        folders[:] = [below for below in folders if not below.startswith(".")]
        if RECORDS in files:  # a run
            folders[:] = [below for below in folders if below == ITEMS]
            continue
        if "multirun.yaml" in files:
            folders[:] = [below for below in folders if below != "grid"]
            continue
        yield from (Path(name, file) for file in files if Path(file).suffix.lower() in suffixes)


def finished_in_shards(folder: Path) -> Iterator[Finished]:
    """Pictures in the shards of runs at any depth."""
    for name, folders, files in os.walk(folder):
        folders[:] = [below for below in folders if not below.startswith(".")]
        if RECORDS in files and SHARDS in folders:
            entries = Ledger.load(Path(name, RECORDS)).entries.items()
            yield from (Finished(Path(name), item, entry) for item, entry in entries if entry.place is not None)
        if RECORDS in files:
            folders.clear()


def files_below(folder: Path) -> list[str]:
    """The files that ``prompts.path`` reads in a folder: pictures, and shards that hold some."""
    shards = {f"{one.run}/{one.entry.place.shard}" for one in finished_in_shards(folder) if one.entry.place is not None}
    return sorted([*map(str, pictures_below(folder)), *shards])


def _path(file: Path | Finished) -> Path:
    """By which a picture is called."""
    return file if isinstance(file, Path) else file.picture.path


def says_how_it_was_drawn(file: Path) -> bool:
    """Whether a picture's metadata, or the record beside it, holds its prompt."""
    from zimage_runner.outputs.metadata import read_metadata

    said = read_metadata(file, pixels=False)
    return bool(said.recipe or has_infotext(said.parameters) or said.comfyui or _record_beside(file))


def recipe_of_picture(file: Path) -> dict[str, Any] | None:
    """What this program says of one of its pictures; None for others'."""
    from zimage_runner.outputs.metadata import read_metadata

    if file.suffix.lower() not in SUFFIXES:
        return None
    return read_metadata(file, pixels=False).recipe or _record_beside(file)


def controlnet_of_picture(file: Path) -> tuple[str, Convention]:
    """Path and convention of the ControlNet that one of this program's pictures was drawn with. Raises UserError."""
    return recorded_controlnet((recipe_of_picture(file) or {}).get("inputs"), shown(file))


def prompt_of_picture(file: Path | Finished, *, inputs: bool = True, moved: Set[str] = frozenset()) -> Prompt:
    """The prompt of one picture. Raises UserError for one that says nothing of how it was drawn.

    ``inputs``: start from the pictures that it started from. ``moved``: fields that the command line says anew, so that
    the files which the picture names for them need not be there.
    """
    from zimage_runner.outputs.metadata import Metadata, check_recipe, read_metadata

    where = shown(_path(file))
    if isinstance(file, Finished):
        said, recipe = Metadata(None, None), _record(file.record)
    elif os.path.lexists(file):
        said = read_metadata(file, pixels=False)
        recipe = said.recipe or _record_beside(file)
    else:
        raise UserError(f"prompts.path={where} does not exist (looked for {shown(file.absolute())})")
    if recipe is not None:
        check_recipe(recipe, where, ("prompt", "seed", "params"))
        params = {name: value for name, value in recipe["params"].items() if name in SAMPLING_KINDS}
        return _prompt(
            GenerationData(text=recipe["prompt"], values={**params, "seeds": recipe["seed"]}, program=OWN_PROGRAM),
            where,
            recipe if inputs else {**recipe, "inputs": {}},
            moved,
        )
    if said.parameters and has_infotext(said.parameters):
        return _prompt(of_parameters(said.parameters), where)
    if said.comfyui:
        return _prompt(of_comfyui(said.comfyui, where), where)
    raise UserError(
        f"{where} does not say how it was drawn as this program, AUTOMATIC1111 and ComfyUI write it: leave it out, or "
        "write its prompt into a text file"
    )


def _record_beside(file: Path) -> dict[str, Any] | None:
    """The record of a run's picture that was written without metadata (``output.metadata=false``)."""
    return _record(Inside(file.parent, RECORD)) if file.stem == "image" else None


def _record(file: Inside) -> dict[str, Any] | None:
    """The record of a finished picture; None where it cannot be read."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("status") == "ok" else None


def _prompt(
    data: GenerationData, where: str, recipe: dict[str, Any] | None = None, moved: Set[str] = frozenset()
) -> Prompt:
    values = {name: value for name, value in data.values.items() if not is_unset(name, value)}
    seeds = values.pop("seeds", None)
    overrides = {name: convert(name, value, where, cfg=data.is_cfg) for name, value in values.items()}
    if data.program != OWN_PROGRAM:
        _tell(data, where)
        if not overrides.get("guidance_scale") and overrides.pop("negative_prompt", None):
            warn_once("negative", f"{where}: its negative prompt had no effect (CFG scale 1): it is left out")
    if data.of_pictures:
        warn_once(
            "of pictures",
            f"{where}: its parameters have {', '.join(data.of_pictures)}, and name no picture file: the prompt is "
            "drawn without (sampling.image=FILE and the fields beside it say what it starts from)",
        )
    carried = (recipe or {}).get("metadata")
    name = (recipe or {}).get("id")
    overrides |= recorded_values((recipe or {}).get("inputs", {}), where, moved=moved)
    return Prompt(
        text=check_text(data.text, where),
        source=where,
        id=None if name is None else check_id(name, where),
        overrides=overrides or NOTHING,
        loras=_loras((recipe or {}).get("loras", []), where),
        seeds=None if seeds is None else seeds_of(seeds, f"{where}: seed"),
        metadata=carry(carried, where) if isinstance(carried, dict) else NOTHING,
    )


def _loras(record: object, where: str) -> tuple[LoraWord, ...]:
    """The adapters that a picture was drawn with, by the paths that their files had."""
    entries = record if isinstance(record, list) else [record]
    named = [{k: entry.get(k) for k in ("path", "weight")} if isinstance(entry, dict) else entry for entry in entries]
    return parse_loras(named, f"{where}: loras")


def _tell(data: GenerationData, where: str) -> None:
    warn_once(
        "other program",
        f"{where} was drawn by {data.program}: prompt, negative prompt, steps, CFG scale, seed and size are taken "
        "from it, and nothing else (model, sampler, LoRAs ...)",
    )
