"""An adapter: the changes that it makes to named tensors of the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError
from zimage_runner.weights.adapters.changes import Change
from zimage_runner.weights.safetensors_file import read_header

if TYPE_CHECKING:
    import torch

PIECE = 2**23


@dataclass(frozen=True, slots=True)
class Delta:
    """One change, of one tensor or of several that are stacked along their rows."""

    component: str
    """transformer or text_encoder."""
    tensors: tuple[str, ...]
    """Published names, in the order in which they are stacked: three for a change of a fused qkv matrix."""
    change: Change
    source: str
    """The module as the file spells it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one file does to the weights."""

    path: Path
    deltas: tuple[Delta, ...]

    def check(self, component: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise UserError, one line, where it does not fit a component with these tensors (published name -> shape)."""
        for delta in self.of(component):
            check_fit(str(self.path), delta.source, delta.tensors, delta.change.shape, shapes)

    def of(self, component: str) -> list[Delta]:
        """Its changes of one component."""
        return [delta for delta in self.deltas if delta.component == component]


def merged(weight: torch.Tensor, changes: Iterable[tuple[Change, float]]) -> torch.Tensor:
    """``weight`` with (change, strength) after (change, strength) made to it, in its own dtype and on its device.

    Computed in float32 and rounded once. ``weight`` is the stacked tensors of the changes' Delta and stays as it is.
    """
    value = weight.float()
    for change, strength in changes:
        value = change.apply(value, strength)
    return value.to(weight.dtype)


def check_fit(
    file: str, source: str, tensors: Sequence[str], found: Sequence[int], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise UserError where a change of this shape does not fit a model's tensors (published name -> shape).

    ``source``: the module as the file spells it.
    """
    missing = next((name for name in tensors if name not in shapes), None)
    if missing:
        raise UserError(f"{file}: {source}: the model has no {missing}: made for another model?")
    shape = stacked_shape([shapes[name] for name in tensors])
    if _without_ones(found) != _without_ones(shape):
        raise UserError(
            f"{file}: {source} changes a weight of shape {list(found)}, the model's is {list(shape)}: "
            "made for another model?"
        )


def stacked_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of tensors stacked along their rows."""
    if len(shapes) == 1:
        return tuple(shapes[0])
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def tensors_sha256(path: Path) -> str:
    """sha256 hex of a safetensors file's bytes after the header: A1111's and Civitai's "Lora hashes" show its first 12.

    A changed title in the header leaves it as it is (sd-webui-additional-networks' hash for safetensors files).
    """
    total, place = hashlib.sha256(), read_header(path).data_start
    with path.open("rb", buffering=0) as file:
        while piece := os.pread(file.fileno(), PIECE, place):
            total.update(piece)
            place += len(piece)
    return total.hexdigest()


def lora_hash(tensors: str) -> str:
    """The 12 digits that "Lora hashes" shows, of ``tensors_sha256``."""
    return tensors[:12]


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A padding token is [dim] in some files and [1, dim] in others."""
    return tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)
