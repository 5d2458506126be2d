"""Adapter files by the names that users give them: found, read once to see that they are sound, and identified.

What is found out about a file is kept in the runner's cache by its sha256: a file that has been seen before is neither
read nor hashed again, and torch is not imported for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.weights.adapters.adapter import check_fit, tensors_sha256
from zimage_runner.weights.cache import read_entry, write_entry
from zimage_runner.weights.find.verify import file_digests
from zimage_runner.weights.formats.files import open_stored
from zimage_runner.weights.formats.source import source_component
from zimage_runner.weights.prepared.names import canonical
from zimage_runner.weights.safetensors_file import BadWeightsFile, read_header

SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, ".gguf", ".pt", ".ckpt", ".bin", ".pth", ".zip")
"""A name that ends in one of these is a file's whole name. What is no safetensors file is refused when it is opened."""
READING = 2
"""Raised whenever the reader understands other files, or the same ones otherwise: what the cache has is read anew."""
MOST_LISTED = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One change that a file makes: of these tensors, stacked, which have this shape."""

    component: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    source: str
    """The module as the file spells it."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file that was read to its end and understood."""

    path: Path
    sha256: str
    """Of the whole file."""
    tensors: str
    """sha256 of the tensors' bytes alone (see ``tensors_sha256``)."""
    parts: tuple[Part, ...]

    @property
    def components(self) -> frozenset[str]:
        """Which of transformer and text_encoder it changes."""
        return frozenset(part.component for part in self.parts)

    def check(self, component: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise UserError, one line, where it does not fit a component with these tensors (published name -> shape)."""
        for part in self.parts:
            if part.component == component:
                check_fit(str(self.path), part.source, part.tensors, part.shape, shapes)


def find_adapter(name: str, folders: Sequence[str], where: str) -> Path:
    """Return the file that a name means: a path, or a file in one of the folders or below it, with or without suffix.

    A path is absolute or relative to where the program was started; one that is there is taken first. ``where`` says
    who named it, for messages. Raises UserError if there is no such file, or several in one folder.
    """
    names = [name] if name.lower().endswith(SUFFIXES) else [name + SUFFIX, name]
    for one in names:
        if (path := Path(os.path.expanduser(one))).is_file():
            return path
    for folder in folders:
        found = _below(Path(os.path.expanduser(folder)), names)
        if len(found) > 1:
            shown = ", ".join(map(str, found[:MOST_LISTED])) + (", ..." if len(found) > MOST_LISTED else "")
            raise UserError(f"{where}: {one_line(name, 120)} could be any of {shown}: write more of its path")
        if found:
            return found[0]
    looked = f"nor in {', '.join(folders)}" if folders else "and lora_dirs names no folder to look in"
    kind = "is a folder" if os.path.isdir(os.path.expanduser(name)) else "is no file here"
    raise UserError(f"{where}: {one_line(name, 120)} {kind}, {looked}: give a {SUFFIX} file")


def check_folders(folders: Sequence[str]) -> None:
    """Raise UserError for one of ``lora_dirs`` that is no folder."""
    for folder in folders:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"lora_dirs: {one_line(folder, 120)} is no folder: name one that holds {SUFFIX} files")


def files_below(folder: Path) -> list[Path]:
    """Return every safetensors file of a folder and the folders below it, in the order of their names."""
    return sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())


def _below(folder: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        if (path := folder / name).is_file():
            return [path]
    wanted = {name.lstrip("./") for name in names}
    return [path for path in files_below(folder) if path.name in wanted or _ends_with(path, wanted)]


def _ends_with(path: Path, names: set[str]) -> bool:
    return any("/" in name and str(path).endswith(f"/{name}") for name in names)


def read_checked(path: Path, where: str) -> AdapterFile:
    """Identify a file, after reading all of it the first time. Raises UserError, one line, as ``read_adapter`` does.

    ``where``: who named the file, for messages where it is no whole weights file at all.
    """
    open_stored(path, f"{where}: {path}")
    (digest,) = file_digests([path])
    known = read_entry("adapter", digest.sha256)
    if known is None or known.get("reading") != READING:
        known = _read(path)
        write_entry("adapter", digest.sha256, known)
    parts = tuple(Part(part[0], tuple(part[1]), tuple(part[2]), part[3]) for part in known["parts"])
    return AdapterFile(path, digest.sha256, known["tensors"], parts)


def _read(path: Path) -> dict[str, Any]:
    from zimage_runner.weights.adapters.reader import read_adapter

    deltas = read_adapter(path).deltas
    parts = [[d.component, list(d.tensors), list(d.change.shape), one_line(d.source, 160)] for d in deltas]
    return {"reading": READING, "tensors": tensors_sha256(path), "parts": parts}


def component_shapes(checkpoint: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each published tensor of a checkpoint's component, from its files' headers.

    Raises UserError if they cannot be read.
    """
    elsewhere = source_component(checkpoint / component)
    if elsewhere is not None:
        return {canonical(component, name): tuple(tensor.shape) for name, tensor in elsewhere.tensors.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted((checkpoint / component).glob(f"*{SUFFIX}")):
        try:
            header = read_header(file)
        except (OSError, BadWeightsFile) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        shapes |= {canonical(component, name): info.shape for name, info in header.tensors.items()}
    return shapes
