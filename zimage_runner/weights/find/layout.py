"""A diffusers-format directory: which files a Z-Image checkpoint needs, and whether they are all there and whole.

Reads JSON and safetensors headers only. Nothing in a model directory is ever executed or unpickled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.find.whole import check_configs, check_tensors
from zimage_runner.weights.formats.files import LFS_POINTER, what_else
from zimage_runner.weights.formats.source import source_component
from zimage_runner.weights.safetensors_file import BadWeightsFile, WeightsFile, read_header

if TYPE_CHECKING:
    from zimage_runner.weights.formats.checkpoint_file import Component

PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
"""Pipelines that are made of the same five components."""
CLASSES = {
    "text_encoder": ("transformers", ("Qwen3Model", "Qwen3ForCausalLM")),
    "transformer": ("diffusers", ("ZImageTransformer2DModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
    "tokenizer": ("transformers", None),
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Components with weights, and the file name that diffusers and transformers give them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_HEAD = 4096
MAX_JSON = 64 * 2**20
"""Bytes; Z-Image-Turbo's largest index has 0.05 MB."""
SMALL_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "tokenizer/*.jinja",
    *(f"{folder}/config.json" for folder in WEIGHT_STEMS),
    "text_encoder/generation_config.json",
]
"""What is downloaded of a repository besides weights: no pictures."""


def hub_patterns(components: Collection[str]) -> list[str]:
    """What is downloaded of a repository whose weights of these components are wanted: no pickles."""
    ends = ("safetensors", "safetensors.index.json")
    return [*SMALL_FILES, *(f"{folder}/*.{end}" for end in ends for folder in WEIGHT_STEMS if folder in components)]


class IncompleteCheckpoint(UserError):
    """Files are missing or damaged; a hub can deliver them again."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.path = path
        self.problems = problems
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        super().__init__(f"{path}: {shown}")


@dataclass(frozen=True, slots=True)
class Layout:
    """A directory whose files are all there and as long as their headers say."""

    path: Path
    configs: dict[str, dict[str, Any]]
    """config.json of each component with weights, and the scheduler's."""
    weights: dict[str, list[WeightsFile]]
    """Files of each component with weights, in name order."""
    config_files: list[Path]
    """Every small file that shapes a picture: configs, scheduler, tokenizer; in name order."""
    sources: dict[str, Component] = field(default_factory=dict)
    """Components whose weights lie in a file elsewhere, in another layout or precision (formats/source.py)."""
    composition: str = ""
    """Which part comes from where, in one line, if not all are from one place."""

    @property
    def weight_bytes(self) -> int:
        return sum({file.path: file.size for files in self.weights.values() for file in files}.values())

    @property
    def weight_paths(self) -> list[Path]:
        """Each file once, though it may hold several components."""
        return list(dict.fromkeys(file.path for folder in WEIGHT_STEMS for file in self.weights.get(folder, [])))

    def name_of(self, path: Path) -> str:
        """A file's name in messages and lists: below the directory, or as a whole path if it is elsewhere."""
        return path.relative_to(self.path).as_posix() if path.is_relative_to(self.path) else str(path)


def inspect(path: Path, field: str = "model.path", components: Collection[str] = tuple(WEIGHT_STEMS)) -> Layout:
    """Check a diffusers-format Z-Image directory and list its files: all there, whole, and what its configs ask for.

    ``components``: those that are wanted of it. Of some alone, whether they fit their configs is left to who puts them
    together with others.

    Raises UserError for what cannot be repaired (not a directory, another pipeline, pickles, custom code, quantised
    weights) and IncompleteCheckpoint, a UserError, when files or tensors are missing or damaged. ``field``
    names the directory in messages.
    """
    index = _model_index(path, field)
    _check_classes(path, index)
    problems: list[str] = []
    wanted = [folder for folder in WEIGHT_STEMS if folder in components]
    configs = {folder: _json(path / folder / "config.json", problems) for folder in wanted}
    configs["scheduler"] = _json(path / "scheduler" / "scheduler_config.json", problems)
    for folder, config in configs.items():
        if "auto_map" in config:
            raise UserError(
                f"{path / folder / 'config.json'}: auto_map asks to run code from the model directory, which is "
                "never done: use a checkpoint of plain Z-Image"
            )
    is_whole = len(wanted) == len(WEIGHT_STEMS)
    if not problems and is_whole:
        check_configs(path, configs, problems)
    found = {folder: source_component(path / folder) for folder in wanted} if not problems else {}
    sources = {folder: component for folder, component in found.items() if component is not None}
    weights = {folder: _weights(path / folder, problems) for folder in wanted if folder not in sources}
    if not problems and is_whole:
        check_tensors(path, configs, weights, problems)
    weights |= {folder: [component.file()] for folder, component in sources.items()}
    tokenizer = _tokenizer_files(path / "tokenizer", problems)
    if problems:
        raise IncompleteCheckpoint(path, problems)
    small = [path / "model_index.json", *tokenizer, path / "scheduler" / "scheduler_config.json"]
    small += [path / folder / "config.json" for folder in wanted]
    return Layout(path, configs, weights, sorted(small), sources)


def _model_index(path: Path, field: str) -> dict[str, Any]:
    if path.is_file():
        raise UserError(f"{field}={path} is a file: give the diffusers-format directory that holds model_index.json")
    if not path.is_dir():
        raise UserError(f"{field}={path}: no such directory")
    file = path / "model_index.json"
    if not file.is_file():
        found = ", ".join(sorted(_shown(p.name) for p in path.iterdir())[:6]) or "nothing"
        raise IncompleteCheckpoint(
            path, [f"not a diffusers-format directory: model_index.json is missing (it holds {found})"]
        )
    problems: list[str] = []
    index = _json(file, problems)
    if problems:
        raise IncompleteCheckpoint(path, problems)
    return index


def _check_classes(path: Path, index: dict[str, Any]) -> None:
    file = path / "model_index.json"
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list):
        raise UserError(
            f"{file}: _class_name={pipeline} asks to run code from the model directory, which is never done"
        )
    if pipeline not in PIPELINES:
        raise UserError(f"{file}: _class_name={pipeline!r} is not a Z-Image pipeline: need {PIPELINES[0]}")
    for component, (library, classes) in CLASSES.items():
        named = index.get(component)
        if not isinstance(named, list) or len(named) != 2:
            raise UserError(f"{file}: {component} is missing: a Z-Image checkpoint names all of {', '.join(CLASSES)}")
        if named[0] != library:
            raise UserError(
                f"{file}: {component} comes from {named[0]!r}, which may be code in the model directory and is never "
                f"run: need {library!r}"
            )
        if classes and named[1] not in classes:
            raise UserError(
                f"{file}: {component} is a {_shown(named[1])}, not a Z-Image component: need {' or '.join(classes)}"
            )


def _shown(text: object) -> str:
    """Foreign text in a message: control characters escaped, so that it stays one line and moves no cursor."""
    return repr(str(text))[1:-1]


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    name = f"{file.parent.name}/{file.name}" if file.name != "model_index.json" else file.name
    if not file.is_file():  # neither is a pipe or a device, which would never end
        problems.append(f"{name} is missing")
        return {}
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON // 2**20} MiB")
        raw = file.read_bytes()
        if (wrong := _no_json(raw[:_HEAD], raw[-_HEAD:])) is not None:
            problems.append(f"{name} {wrong}")
            return {}
        value = from_json(raw)
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read ({error})")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} does not hold a JSON object")
        return {}
    return value


def _no_json(head: bytes, tail: bytes) -> str | None:
    """What a file is that cannot be JSON, by its first and last bytes; None where it may be."""
    if not head.strip():
        return "is empty"
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        return what_else(head)
    return None if tail.rstrip().endswith((b"}", b"]")) else "is cut off"


def _weights(folder: Path, problems: list[str]) -> list[WeightsFile]:
    stem = WEIGHT_STEMS[folder.name]
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        # diffusers and transformers disagree on which of the two they would load.
        problems.append(f"{folder.name}/ holds both {single.name} and {index.name}: remove one of them")
        return []
    if index.is_file():
        return _shards(folder, index, problems)
    if single.is_file():
        file = _checked(single, problems)
        return [file] if file else []
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise UserError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code and are never loaded: "
            "get or convert to safetensors"
        )
    problems.append(f"{folder.name}/{single.name} (or its index and shards) is missing")
    return []


def _shards(folder: Path, index: Path, problems: list[str]) -> list[WeightsFile]:
    weight_map = _json(index, problems).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{folder.name}/{index.name} has no weight_map")
        return []
    files: dict[str, WeightsFile | None] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            problems.append(f"{folder.name}/{index.name} names {shard!r}, which is not a safetensors file beside it")
        elif not (folder / shard).is_file():
            problems.append(f"{folder.name}/{_shown(shard)} is missing")
        else:
            files[shard] = _checked(folder / shard, problems)
    for tensor, shard in weight_map.items():
        file = files.get(str(shard))
        if file and tensor not in file.tensors:
            problems.append(f"{folder.name}/{shard} lacks tensor {tensor!r} that the index promises")
            break
    return [file for file in files.values() if file]


def _checked(file: Path, problems: list[str]) -> WeightsFile | None:
    name = f"{file.parent.name}/{_shown(file.name)}"
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
        wrong = what_else(head) if head else None
        if wrong is None:
            return read_header(file)
        problems.append(f"{name} {wrong}")
    except BadWeightsFile as error:
        problems.append(f"{name} is {one_line(str(error), 300)}")
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror or error}")
    return None


def _tokenizer_files(folder: Path, problems: list[str]) -> list[Path]:
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".txt", ".jinja") and p.is_file())
    names = {file.name for file in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        problems.append("tokenizer/tokenizer.json is missing")
    if "tokenizer_config.json" not in names:
        problems.append("tokenizer/tokenizer_config.json is missing")
    for file in files:
        _check_small(file, problems)
    return files


def _check_small(file: Path, problems: list[str]) -> None:
    """Report a tokenizer file that is no such file, by its ends: parsing 11 MB of JSON would take a tenth of a second.

    What else is wrong inside shows when the tokenizer is made, before anything is loaded.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
            opened.seek(max(0, size - _HEAD))
            tail = opened.read(_HEAD)
    except OSError as error:
        problems.append(f"tokenizer/{_shown(file.name)} cannot be read: {error.strerror or error}")
        return
    if size > MAX_JSON:
        problems.append(f"tokenizer/{_shown(file.name)} is larger than {MAX_JSON // 2**20} MiB")
    elif (wrong := _no_json(head, tail) if file.suffix == ".json" else _pointer(head)) is not None:
        problems.append(f"tokenizer/{_shown(file.name)} {wrong}")


def _pointer(head: bytes) -> str | None:
    return what_else(head) if head.startswith(LFS_POINTER) else None
