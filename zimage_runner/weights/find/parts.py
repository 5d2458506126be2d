"""A checkpoint whose parts come from several places: files of any layout, directories, and the published one.

A folder in the runner's cache holds what a diffusers-format directory holds: small files as they are, links to
directories, and for each part in a file where that is (formats/source.py). Everything else in the package takes this
folder for a checkpoint; nothing large is copied, and nothing is written beside the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.model import FileModel, Model, Source, names_a_file
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.cache import cache_root, make_folders, write_json
from zimage_runner.weights.find.hubs import HUB_NAMES
from zimage_runner.weights.find.layout import CLASSES, IncompleteCheckpoint, Layout, inspect
from zimage_runner.weights.formats.checkpoint_file import COMPONENTS, open_component, recognise
from zimage_runner.weights.formats.configs import scheduler_config
from zimage_runner.weights.formats.source import SOURCE

TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
INDEX = {
    "_class_name": "ZImagePipeline",
    **{name: [library, classes[0]] for name, (library, classes) in CLASSES.items() if classes},
}
Published = Callable[[Model, Collection[str]], Layout]
"""Finds, or downloads, these components of a published checkpoint; tokenizer and scheduler always are there."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one part of a checkpoint comes from, as the user said."""

    name: str
    field: str
    """The config field that says so."""
    path: Path
    is_file: bool


def given_parts(model: Model) -> dict[str, Part]:
    """The parts that ``model`` names, looked at by their first bytes and headers.

    Raises UserError, one line, for a path that is not there, a file that is no whole file of weights, and one that
    does not hold the part.
    """
    parts: dict[str, Part] = {}
    if names_a_file(model.path):
        path = _absolute(str(model.path))
        held = _recognised("model.path", path)
        parts |= {name: Part(name, "model.path", path, True) for name in held}
    for name, given in model.parts.items():
        parts[name] = _part(name, f"model.{name}", _absolute(given))
    return parts


def _part(name: str, field: str, path: Path) -> Part:
    if path.is_dir():
        inside = path / name
        return Part(name, field, inside if (path / "model_index.json").is_file() and inside.is_dir() else path, False)
    if name == TOKENIZER:
        raise UserError(f"{field}={path} is no directory: give the one that holds tokenizer.json")
    held = _recognised(field, path)
    if name not in held:
        fields = " and ".join(f"model.{other}" for other in held)
        raise UserError(f"{field}={path} holds no {name}: it is for {fields}")
    return Part(name, field, path, True)


def _recognised(field: str, path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{field}={path}: no such file")
    return recognise(path, f"{field}={path}")


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def base_of(model: Model) -> Model:
    """The checkpoint that has the parts which ``model`` does not name."""
    path = None if names_a_file(model.path) else model.path
    return Model(
        name=model.name,
        source=model.source,
        repo=model.repo,
        revision=model.revision,
        path=path,
        cache_dir=model.cache_dir,
        offline=model.offline,
        verify=model.verify,
    )


def missing_parts(model: Model, parts: Collection[str]) -> list[str]:
    """What must come from the published checkpoint."""
    missing = [name for name in (*COMPONENTS, TOKENIZER) if name not in parts]
    return missing if isinstance(model, FileModel) else [*missing, SCHEDULER]


def assemble(model: Model, published: Published) -> Layout:
    """Put the parts together. Raises UserError for parts that are damaged, missing or do not belong together."""
    parts = given_parts(model)
    missing = missing_parts(model, parts)
    base = _base(model, published, parts, missing) if missing else None
    folder = _folder(parts, base, model)
    try:
        _write_folder(folder, parts, base, model)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}), where a checkpoint of several files is put together: set "
            "ZIMAGE_RUNNER_CACHE to a folder of your own"
        ) from error
    told = _composition(model, parts, missing, base)
    try:
        return replace(inspect(folder), composition=told)
    except IncompleteCheckpoint as error:
        raise UserError(f"{told}: {'; '.join(error.problems[:3])}") from error


def _base(model: Model, published: Published, parts: Mapping[str, Part], missing: list[str]) -> Layout:
    base = base_of(model)
    try:
        return published(base, [name for name in missing if name in COMPONENTS])
    except UserError as error:
        if base.path is not None or base.source not in HUB_NAMES:
            raise
        raise UserError(f"{_places(parts)}, and not {', '.join(missing)}: {error}") from error


def _places(parts: Mapping[str, Part]) -> str:
    """``model.path=FILE has the transformer``, for messages."""
    by_place: dict[str, list[str]] = {}
    for part in parts.values():
        by_place.setdefault(f"{part.field}={part.path}", []).append(part.name)
    return ", ".join(f"{place} has the {' and '.join(names)}" for place, names in by_place.items())


def _composition(model: Model, parts: Mapping[str, Part], missing: list[str], base: Layout | None) -> str:
    """Which part comes from where, in one line."""
    if base is None:
        return _places(parts)
    is_hub = model.source in HUB_NAMES and base_of(model).path is None
    *others, last = missing
    names = f"{', '.join(others)} and {last} come" if others else f"{last} comes"
    return f"{_places(parts)}; {names} from {model.repo if is_hub else base.path}"


def _folder(parts: Mapping[str, Part], base: Layout | None, model: Model) -> Path:
    """One folder for each choice of places, so that runs of different files never write the same."""
    variant = model.variant.value if isinstance(model, FileModel) and model.variant else None
    places = {name: str(part.path) for name, part in sorted(parts.items())}
    key = json.dumps([places, str(base.path) if base else None, variant])
    return cache_root() / "assembled" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _write_folder(folder: Path, parts: Mapping[str, Part], base: Layout | None, model: Model) -> None:
    configs = _base_configs(base)
    links: dict[str, Path] = {}
    files: dict[str, dict[str, Any]] = {}
    for name in (*COMPONENTS, TOKENIZER):
        part = parts.get(name)
        if part is None:
            assert base is not None, name
            links[name] = base.path / name
        elif part.is_file:
            files[f"{name}/config.json"] = _config(part, configs, model)
            files[f"{name}/{SOURCE}"] = {"file": str(part.path)}
        else:
            links[name] = part.path
    if isinstance(model, FileModel) and model.variant is not None:
        files[f"{SCHEDULER}/scheduler_config.json"] = scheduler_config(model.variant.value)
    else:
        assert base is not None
        links[SCHEDULER] = base.path / SCHEDULER
    files["model_index.json"] = {**INDEX, TOKENIZER: ["transformers", _tokenizer_class(links[TOKENIZER])]}
    for name, target in links.items():
        _link(folder / name, target)
    for name, content in files.items():
        _write(folder / name, content)


def _config(part: Part, configs: Mapping[str, dict[str, Any]], model: Model) -> dict[str, Any]:
    """config.json of a part in a file. Raises UserError naming what is missing, unknown or of another shape."""
    try:
        return open_component(part.path, part.name, configs.get(part.name)).config
    except UserError as error:
        if model.source is not Source.embedded or isinstance(model, FileModel):
            raise
        raise UserError(
            f"{part.field}={part.path} is no {part.name} of model={model.name}: a file of Z-Image is drawn with "
            f"model=file model.path={part.path} model.variant=turbo (or base) ({error})"
        ) from error


def _base_configs(base: Layout | None) -> dict[str, dict[str, Any]]:
    """Configs of the published checkpoint, as far as they are there: of parts that are replaced they need not be."""
    configs = {}
    for name in COMPONENTS if base else ():
        assert base is not None
        try:
            config = from_json((base.path / name / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            configs[name] = config
    return configs


def _tokenizer_class(folder: Path) -> str:
    try:
        config = from_json((folder / "tokenizer_config.json").read_bytes())
        name = config.get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        name = None  # what is wrong with it shows when the folder is looked at
    return name if isinstance(name, str) and name.isidentifier() else "Qwen2Tokenizer"


def _link(path: Path, target: Path) -> None:
    """Make ``path`` a link to ``target``, unless it is."""
    if path.is_symlink() and os.readlink(path) == str(target):
        return
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, unless it says so already."""
    try:
        if from_json(path.read_bytes()) == content:
            return
    except (OSError, ValueError):
        pass
    write_json(path, content)
