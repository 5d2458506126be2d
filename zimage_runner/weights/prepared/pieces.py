"""From published tensors to prepared ones, piece by piece: which bytes go where, and their rounding to bfloat16."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError
from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.io import read_exactly
from zimage_runner.weights.prepared.names import QUANTISED, prepared_tensors
from zimage_runner.weights.safetensors_file import ITEM_BITS, TensorInfo

if TYPE_CHECKING:
    import torch

    from zimage_runner.weights.formats.decode import PublishedTensor

PIECE = 8 * 1024 * 1024
"""Elements handled at a time by each thread."""
ALIGNMENT = 256
"""Bytes: what CUDA's own allocator gives."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
EIGHT_BITS = {"fp8": "F8_E4M3", "int8": "I8"}
"""Precisions of prepared copies besides bf16, and how safetensors names their numbers."""
SCALE = "_scale"
"""Behind a weight's name: the tensor of its rows' scales."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A published tensor that a prepared one is made of."""

    name: str
    path: Path
    info: TensorInfo
    """Where its numbers lie; of one that must be decoded, as if they lay at byte 0 in float32."""
    decoded: PublishedTensor | None = None


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of a prepared file and the published tensors it is made of, stacked along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Origin, ...]
    dtype: str = "BF16"
    scales: Scales | None = None
    """Of a weight in eight bits and of the tensor of its scales."""

    @property
    def nbytes(self) -> int:
        return ITEM_BITS[self.dtype] // 8 * math.prod(self.shape)


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
    stored: str = "BF16"
    """The dtype in the prepared file."""
    first: int = 0
    """The piece's first element, counted in the prepared tensor."""
    scales: Scales | None = None
    decoded: PublishedTensor | None = None
    """What the numbers are decoded from; ``source_offset`` then counts as if they were float32."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element in the source."""
        return 4 if self.dtype == "F32" else 2

    @property
    def stored_bytes(self) -> int:
        """Bytes of an element in the prepared file."""
        return ITEM_BITS[self.stored] // 8

    @property
    def nbytes(self) -> int:
        """In the prepared file."""
        return self.count * self.stored_bytes


def plan_component(layout: Layout, component: str, precision: str = "bf16") -> list[PlannedTensor]:
    """The tensors of one prepared component, in file order. Raises UserError for dtypes that are not floats."""
    stored = {name: (file.path, info) for file in layout.weights[component] for name, info in file.tensors.items()}
    for name, (path, info) in stored.items():
        if info.dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name!r} is {info.dtype}: only {', '.join(DTYPES)} can be prepared")
    source = layout.sources.get(component)
    decoded = {name: tensor for name, tensor in source.tensors.items() if tensor.info is None} if source else {}
    layers = int(layout.configs[component].get("num_hidden_layers", 0))
    planned = []
    for tensor in prepared_tensors(component, stored, num_hidden_layers=layers):
        sources = tuple(Origin(name, *stored[name], decoded.get(name)) for name in tensor.sources)
        shapes = [source.info.shape for source in sources]
        shape = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
        planned.append(PlannedTensor(tensor.name, shape, sources))
    if component == "transformer" and precision != "bf16":
        planned = list(_in_eight_bits(planned, precision))
    # A tensor of odd size would put all that follow it on addresses that matrix kernels do not like: those go last.
    # Those in eight bits come together, so that frames of packed files hold either kind.
    return sorted(planned, key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, tensor.dtype in EIGHT_BITS.values()))


def _in_eight_bits(planned: Iterable[PlannedTensor], precision: str) -> Iterator[PlannedTensor]:
    """The tensors, those that can be in eight bits followed by their scales."""
    for tensor in planned:
        if QUANTISED.fullmatch(tensor.name) is None:
            yield tensor
            continue
        decoded = [origin.decoded for origin in tensor.sources]
        as_stored = precision == "fp8" and all(source is not None and source.stored.is_fp8 for source in decoded)
        scales = StoredScales(tensor) if as_stored else RowScales(tensor, precision)
        yield replace(tensor, dtype=EIGHT_BITS[precision], scales=scales)
        yield replace(tensor, name=tensor.name + SCALE, shape=tensor.shape[:1], dtype="F32", scales=scales)


def places_of(plan: Iterable[PlannedTensor]) -> dict[str, int]:
    """Offset of each tensor in the data of an unpacked file, and nothing between them."""
    plan = list(plan)
    return dict(zip((t.name for t in plan), itertools.accumulate((t.nbytes for t in plan), initial=0)))


def pieces(plan: Iterable[PlannedTensor], places: Mapping[str, int]) -> Iterator[Piece]:
    """Cut the tensors into pieces; ``places`` has the file offset of each prepared tensor."""
    for tensor in plan:
        offset, first = places[tensor.name], 0
        if tensor.dtype == "F32":  # scales: their rows' weights are the source
            origin = tensor.sources[0]
            yield Piece(
                tensor.name, origin.path, origin.info.start, "F32", tensor.shape[0], offset, "F32", 0, tensor.scales
            )
            continue
        item = ITEM_BITS[tensor.dtype] // 8
        for origin in tensor.sources:
            info = origin.info
            total, size = math.prod(info.shape), 4 if info.dtype == "F32" else 2
            for begin in range(0, total, PIECE):
                yield Piece(
                    tensor.name, origin.path, info.start + begin * size, info.dtype, min(PIECE, total - begin),
                    offset + item * begin, tensor.dtype, first + begin, tensor.scales, origin.decoded,
                )  # fmt: skip
            offset, first = offset + item * total, first + total


def cut(whole: Iterable[Piece], nbytes: int) -> Iterator[Piece]:
    """The pieces, cut where they cross a multiple of ``nbytes`` (even) of the prepared data."""
    for piece in whole:
        done, item = 0, piece.stored_bytes
        while done < piece.count:
            offset = piece.offset + item * done
            count = min(piece.count - done, (nbytes - offset % nbytes) // item)
            source_offset = piece.source_offset + piece.item_bytes * done
            first = piece.first + done
            yield replace(piece, source_offset=source_offset, count=count, offset=offset, first=first)
            done += count


def read_piece(piece: Piece) -> torch.Tensor:
    """The piece's bytes in the prepared file, uint8."""
    import torch

    if piece.scales is None:
        return read_bfloat16(piece).view(torch.uint8)
    if piece.stored == "F32":
        return piece.scales()[piece.first : piece.first + piece.count].contiguous().view(torch.uint8)
    return piece.scales.numbers(piece)


def read_bfloat16(piece: Piece) -> torch.Tensor:
    """The piece's elements rounded to bfloat16 (round to nearest even, as ``Tensor.to`` does)."""
    import torch

    if piece.decoded is not None:
        return piece.decoded.elements(piece.source_offset // piece.item_bytes, piece.count).to(torch.bfloat16)
    dtype = getattr(torch, DTYPES[piece.dtype])
    tensor = torch.empty(piece.count, dtype=dtype)
    with piece.source.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), piece.source_offset, tensor.view(torch.uint8).numpy().data, piece.source)
    return tensor.to(torch.bfloat16)


class RowScales:
    """The scales of a weight's rows, computed from its published tensors when they are first asked for.

    Weights are rounded to bfloat16 first: a copy in eight bits is what an engine makes of the copy in bfloat16.
    """

    def __init__(self, tensor: PlannedTensor, precision: str) -> None:
        self._tensor, self._precision = tensor, precision
        self._columns = math.prod(tensor.shape[1:])
        self._lock = threading.Lock()
        self._scales: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        """[rows] float32. Threads that ask at the same time wait for one that computes."""
        import torch

        with self._lock:
            if self._scales is None:
                self._scales = torch.cat([self._of(origin) for origin in self._tensor.sources])
            return self._scales

    def _of(self, origin: Origin) -> torch.Tensor:
        import torch

        from zimage_runner.weights.eight_bits import FORMATS, quantise_rows

        info, rows = origin.info, max(1, PIECE // self._columns)
        scales = []
        for begin in range(0, info.shape[0], rows):
            count = min(rows, info.shape[0] - begin) * self._columns
            item = 4 if info.dtype == "F32" else 2
            start = info.start + begin * self._columns * item
            piece = Piece(self._tensor.name, origin.path, start, info.dtype, count, 0, decoded=origin.decoded)
            scales.append(quantise_rows(read_bfloat16(piece).view(-1, self._columns), FORMATS[self._precision])[1])
        return torch.cat(scales)

    def numbers(self, piece: Piece) -> torch.Tensor:
        """The piece's weights in eight bits, uint8."""
        import torch

        return self.rounded(read_bfloat16(piece), piece.first).view(torch.uint8)

    def rounded(self, weights: torch.Tensor, first: int) -> torch.Tensor:
        """Consecutive weights in eight bits; ``first`` is the first one's number in the tensor."""
        import torch

        from zimage_runner.weights.eight_bits import FORMATS, round_rows

        begin, lead = divmod(first, self._columns)
        rows = -(-(lead + len(weights)) // self._columns)
        whole = torch.zeros(rows * self._columns)
        whole[lead : lead + len(weights)] = weights
        scales = self()[begin : begin + rows]
        values = round_rows(whole.view(rows, -1), scales, FORMATS[self._precision])
        return values.flatten()[lead : lead + len(weights)].contiguous()


class StoredScales:
    """Of a weight whose published tensors are fp8 with scales: its numbers are taken as they are."""

    def __init__(self, tensor: PlannedTensor) -> None:
        self._origins = [origin.decoded for origin in tensor.sources if origin.decoded is not None]

    def __call__(self) -> torch.Tensor:
        """[rows] float32."""
        import torch

        return torch.cat([origin.row_scales() for origin in self._origins])

    def numbers(self, piece: Piece) -> torch.Tensor:
        """The piece's numbers, uint8."""
        assert piece.decoded is not None
        return piece.decoded.raw_bytes(piece.source_offset // piece.item_bytes, piece.count)


Scales = RowScales | StoredScales
