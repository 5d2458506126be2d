"""A ControlNet on disk: found by the path that the user gives, checked and identified before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from zimage_runner.errors import PROGRAM, UserError, called, counted
from zimage_runner.model import EMBEDDED_CONTROLNET, EMBEDDED_CONTROLNET_FILE, Model, Source, Verify
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.cache import is_writable
from zimage_runner.weights.find.digest import sampled_digests
from zimage_runner.weights.find.verify import PIECE, file_digests
from zimage_runner.weights.formats.controlnet import EMBEDDER, FIRST_PROJECTION, PUBLISHED, ControlLayout, layout_of
from zimage_runner.weights.formats.files import StoredFile, open_stored
from zimage_runner.weights.safetensors_file import TensorInfo, read_header

FIELD = "model.controlnet"
SUFFIX = ".safetensors"
EMBEDDED_FILE = Path(__file__).resolve().parents[2] / "assets" / EMBEDDED_CONTROLNET_FILE
EMBEDDED_SHA256 = "b2cbc5e9c911d979d30af9c6879b3a639c93d729d695634ede1fa935448e62d8"


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlNetFile:
    """A complete ControlNet that fits the model."""

    path: Path
    """What the user named, absolute."""
    files: tuple[Path, ...]
    """Its safetensors files: one, or the shards of a directory."""
    layout: ControlLayout
    digest: str
    """Identity of its weights (sha256 hex), wherever they lie."""


def find_controlnet(model: Model, transformer: Mapping[str, Any]) -> ControlNetFile | None:
    """The ControlNet that ``model.controlnet`` names; None where it names none.

    ``transformer``: config.json of the model's transformer. Raises UserError, one line, for a path that is not there
    and a file that is damaged, incomplete, quantised, something else or made for another model.
    """
    if model.controlnet is None:
        return None
    path, files = _absolute(model.controlnet), controlnet_files(model)
    label, folder_config = f"{FIELD}={path}", _config(path)
    stored = [open_stored(file, label if path.is_file() else str(file)) for file in files]
    tensors = _tensors(label, stored)
    layout = layout_of(str(path), tensors, transformer, _projects(stored), folder_config)
    if model.verify is not Verify.headers and is_writable():
        _verify(stored, model.verify is Verify.always, is_embedded=path == EMBEDDED_FILE)
    digests = sampled_digests([read_header(file.path) for file in stored])
    total = hashlib.sha256(json.dumps([layout.record(), digests], sort_keys=True).encode())
    return ControlNetFile(path=path, files=tuple(f.path for f in stored), layout=layout, digest=total.hexdigest())


def describe_controlnet(path: Path) -> list[str]:
    """What a file is, in a few lines. Raises UserError, as above."""
    stored = open_stored(path)
    tensors = _tensors(str(path), [stored])
    dim, channels = tensors[f"{EMBEDDER}.weight"].shape if f"{EMBEDDER}.weight" in tensors else (0, 0)
    kinds = sorted({info.dtype for info in tensors.values()})
    known = {**PUBLISHED, "dim": dim} if dim else PUBLISHED
    lines = [
        f"file: {path}",
        f"format: safetensors, {stored.size / 1e9:.3f} GB, {counted(len(tensors), 'tensor')}, {', '.join(kinds)}",
    ]
    try:
        layout = layout_of(str(path), tensors, known, _projects([stored]))
        lines.append(f"ControlNet of Z-Image: {layout.name}; hints behind layers {', '.join(map(str, layout.places))}")
    except UserError as error:
        lines.append(
            f"ControlNet, for another model than Z-Image (dim {dim}, {channels // 4} channels) or damaged: {error}"
        )
    return [*lines, f"use: model.controlnet={path} sampling.control_image=PICTURE"]


def controlnet_files(model: Model) -> list[Path]:
    """A file itself, or a directory's only ones: those of its index, else the only safetensors file there.

    Empty where ``model.controlnet`` names none. Raises UserError for what is not there.
    """
    if model.controlnet is None:
        return []
    if model.controlnet == EMBEDDED_CONTROLNET and model.path is None and model.source is not Source.embedded:
        raise UserError(
            f"{FIELD}={EMBEDDED_CONTROLNET} fits model=zimage_nano alone: choose that, or give a file made for "
            f"{model.name}"
        )
    path = _absolute(model.controlnet)
    label = f"{FIELD}={path}"
    if not path.is_dir():
        if not path.exists():
            near = get_close_matches(path.name.lower(), [EMBEDDED_CONTROLNET])
            meant = f"; did you mean {FIELD}={near[0]}?" if near else ""
            raise UserError(f"{label}: no such file or directory{meant}")
        return [path]
    indices = sorted(path.glob(f"*{SUFFIX}.index.json"))
    if indices:
        return _shards(indices[0])
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"{label} holds no {SUFFIX} file: give the ControlNet's file, or its directory")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UserError(f"{label} holds several files ({names}): name one of them")
    return files


def _absolute(path: str) -> Path:
    return EMBEDDED_FILE if path == EMBEDDED_CONTROLNET else Path(path).expanduser().absolute()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(from_json(index.read_bytes())["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: download the ControlNet again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{index} names files that are not there: {', '.join(missing[:3])}: download them again")
    return files


def _config(path: Path) -> Mapping[str, Any] | None:
    """config.json of a directory; None where there is none."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    try:
        config = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    return config


def _tensors(label: str, stored: list[StoredFile]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in stored:
        if file.kind != "safetensors":
            raise UserError(f"{label} is a GGUF file: quantised ControlNets are not read, get the {SUFFIX} file")
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            raise UserError(f"{file.path}: {twice} is there twice, in two files of {label}")
        tensors |= file.tensors
    return tensors


def _projects(stored: list[StoredFile]) -> bool:
    """Whether the refiner's first projection is there and not all zeros, as an untrained one's is."""
    for file in stored:
        info = file.tensors.get(FIRST_PROJECTION)
        if info is not None:
            with file.path.open("rb") as handle:
                handle.seek(info.start)
                for begin in range(0, info.nbytes, PIECE):
                    if handle.read(min(PIECE, info.nbytes - begin)).strip(b"\0"):
                        return True
    return False


def _verify(stored: list[StoredFile], always: bool, *, is_embedded: bool) -> None:
    """Compare sha256 with the first use's, and look for NaN. Raises UserError naming the file."""
    for digest in file_digests([file.path for file in stored], always):
        if is_embedded:  # another version of this package brings another one
            if digest.sha256 != EMBEDDED_SHA256:
                raise UserError(f"{FIELD}={EMBEDDED_CONTROLNET}: {digest.path} was altered: reinstall zimage-runner")
        elif digest.is_altered:
            raise UserError(
                f"{digest.path} was altered: sha256 {digest.sha256[:16]}... instead of {str(digest.expected)[:16]}... "
                f"of {digest.expected_from}: copy it again, or accept it as it is with "
                f"`{called(PROGRAM)} prepare accept` and the same model options"
            )
    from zimage_runner.weights.find.finite import check_finite_tensors  # what decodes comes with it

    for file in stored:
        check_finite_tensors(file.path, file.tensors, always)
