"""From published tensors to prepared ones, piece by piece: which bytes go where, and their rounding to bfloat16."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError
from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.io import read_exactly
from zimage_runner.weights.prepared.names import prepared_tensors
from zimage_runner.weights.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch

PIECE = 8 * 1024 * 1024
"""Elements handled at a time by each thread."""
ALIGNMENT = 256
"""Bytes: what CUDA's own allocator gives."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of a prepared file and the published tensors it is made of, stacked along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, Path, TensorInfo], ...]

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of one tensor: where they lie in the source and in the prepared file."""

    tensor: str
    source: Path
    source_offset: int
    dtype: str
    count: int
    offset: int
    """In bytes; of a packed file, in its unpacked data."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element in the source."""
        return 4 if self.dtype == "F32" else 2


def plan_component(layout: Layout, component: str) -> list[PlannedTensor]:
    """The tensors of one prepared component, in file order. Raises UserError for dtypes that are not floats."""
    stored = {name: (file.path, info) for file in layout.weights[component] for name, info in file.tensors.items()}
    for name, (path, info) in stored.items():
        if info.dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name!r} is {info.dtype}: only {', '.join(DTYPES)} can be prepared")
    layers = int(layout.configs[component].get("num_hidden_layers", 0))
    planned = []
    for tensor in prepared_tensors(component, stored, num_hidden_layers=layers):
        sources = tuple((name, *stored[name]) for name in tensor.sources)
        shapes = [info.shape for _, _, info in sources]
        shape = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
        planned.append(PlannedTensor(tensor.name, shape, sources))
    # A tensor of odd size would put all that follow it on addresses that matrix kernels do not like: those go last.
    return sorted(planned, key=lambda tensor: tensor.nbytes % ALIGNMENT != 0)


def places_of(plan: Iterable[PlannedTensor]) -> dict[str, int]:
    """Offset of each tensor in the data of an unpacked file, and nothing between them."""
    plan = list(plan)
    return dict(zip((t.name for t in plan), itertools.accumulate((t.nbytes for t in plan), initial=0)))


def pieces(plan: Iterable[PlannedTensor], places: Mapping[str, int]) -> Iterator[Piece]:
    """Cut the tensors into pieces; ``places`` has the file offset of each prepared tensor."""
    for tensor in plan:
        offset = places[tensor.name]
        for _, path, info in tensor.sources:
            total, size = math.prod(info.shape), 4 if info.dtype == "F32" else 2
            for begin in range(0, total, PIECE):
                count = min(PIECE, total - begin)
                yield Piece(tensor.name, path, info.start + begin * size, info.dtype, count, offset + 2 * begin)
            offset += 2 * total


def cut(whole: Iterable[Piece], nbytes: int) -> Iterator[Piece]:
    """The pieces, cut where they cross a multiple of ``nbytes`` (even) of the prepared data."""
    for piece in whole:
        done = 0
        while done < piece.count:
            offset = piece.offset + 2 * done
            count = min(piece.count - done, (nbytes - offset % nbytes) // 2)
            source_offset = piece.source_offset + piece.item_bytes * done
            yield replace(piece, source_offset=source_offset, count=count, offset=offset)
            done += count


def read_bfloat16(piece: Piece) -> torch.Tensor:
    """The piece's elements rounded to bfloat16 (round to nearest even, as ``Tensor.to`` does)."""
    import torch

    dtype = getattr(torch, DTYPES[piece.dtype])
    tensor = torch.empty(piece.count, dtype=dtype)
    with piece.source.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), piece.source_offset, tensor.view(torch.uint8).numpy().data, piece.source)
    return tensor.to(torch.bfloat16)
