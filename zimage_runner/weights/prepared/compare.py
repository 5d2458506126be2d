"""Proof that a prepared checkpoint equals its source: bitwise, every tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.io import Threads, read_exactly
from zimage_runner.weights.packed.format import Packing
from zimage_runner.weights.prepared.names import COMPONENTS, canonical
from zimage_runner.weights.prepared.pieces import Piece, cut, pieces, plan_component, read_piece
from zimage_runner.weights.prepared.prepare import THREADS
from zimage_runner.weights.prepared.prepared import BF16, VERSION, Prepared
from zimage_runner.weights.safetensors_file import BadWeightsFile

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Comparison:
    """What was compared and what differs."""

    tensors: int = 0
    nbytes: int = 0
    differences: list[str] = field(default_factory=list)


def compare(layout: Layout, prepared: Prepared) -> Comparison:
    """Compare every prepared byte with the source rounded to bfloat16 (and then, where the copy is in eight bits, to
    those), and every config file with its original."""
    result = Comparison()
    for component in COMPONENTS:
        _compare_component(layout, prepared, component, result)
    for name in prepared.manifest["config_files"]:
        if (layout.path / name).read_bytes() != (prepared.path / name).read_bytes():
            result.differences.append(f"{name} differs")
    return result


def _compare_component(layout: Layout, prepared: Prepared, component: str, result: Comparison) -> None:
    precision = prepared.manifest.get("precision", BF16)
    plan, file, packing = plan_component(layout, component, precision), prepared.weights[component], None
    if component in prepared.packings:
        packing = prepared.packings[component]
        file = packing.unpacked
    common = []
    for tensor in plan:
        info = file.tensors.get(tensor.name)
        if info is None or info.shape != tensor.shape or info.dtype != tensor.dtype:
            result.differences.append(f"{component}: {tensor.name} is missing or of another shape or dtype")
        else:
            common.append(tensor)
    extra = set(file.tensors) - {tensor.name for tensor in plan}
    if prepared.manifest["version"] != VERSION:  # it may hold what is left out today, and nothing reads
        published = {name for stored in layout.weights[component] for name in stored.tensors}
        extra -= {canonical(component, name) for name in published}
    result.differences += [f"{component}: {name} is not in the source" for name in sorted(extra)]
    places = {name: info.start for name, info in file.tensors.items()}
    result.tensors += len(common)
    if packing is None:
        todo, stored = pieces(common, places), functools.partial(_read_plain, file.path)
    else:
        todo, stored = cut(pieces(common, places), packing.frame_bytes), _packed_reader(packing)
    different: dict[str, None] = {}
    with Threads(THREADS) as pool:
        for piece, equal in pool.map(lambda piece: (piece, _equal(piece, stored)), todo):
            result.nbytes += piece.nbytes
            if not equal:
                different[piece.tensor] = None
    result.differences += [f"{component}: {name} differs from the source" for name in different]


def _equal(piece: Piece, stored: Callable[[Piece], torch.Tensor]) -> bool:
    """Bit by bit, so that NaN equals itself and -0 differs from 0."""
    import torch

    try:
        return torch.equal(read_piece(piece), stored(piece))
    except BadWeightsFile:  # a frame that contradicts itself
        return False


def _read_plain(path: Path, piece: Piece) -> torch.Tensor:
    """The piece's bytes in the prepared file."""
    import torch

    stored = torch.empty(piece.nbytes, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), piece.offset, stored.numpy().data, path)
    return stored


def _packed_reader(packing: Packing) -> Callable[[Piece], torch.Tensor]:
    """The same of a packed file, whose pieces are cut where its frames are."""
    from zimage_runner.weights.packed.unpack import read_frame

    @functools.lru_cache(maxsize=THREADS)  # many small tensors share a frame
    def frame_at(start: int) -> torch.Tensor:
        return read_frame(packing, frames[start])

    frames = {frame.start: frame for frame in packing.frames}

    def read(piece: Piece) -> torch.Tensor:
        begin = piece.offset % packing.frame_bytes
        return frame_at(piece.offset - begin)[begin : begin + piece.nbytes]

    return read
