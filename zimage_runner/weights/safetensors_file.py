"""Safetensors files: reading headers, and writing a file piece by piece. Without torch.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors/index#format). The library's own writer wants every tensor at once. In files
written here the tensors' bytes begin at a multiple of 4096 (the format allows spaces after the header's JSON), so that
reads straight from the disk are aligned.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""The format's own bound on the header, in bytes."""
ALIGNMENT = 4096
"""Of the first tensor's bytes, in files written here."""
MOST_DIMENSIONS, LARGEST_NUMBER = 64, 2**62
"""Of a tensor's shape: torch's own bounds."""
ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip


class BadWeightsFile(Exception):
    """A safetensors file that cannot be what it says it is; the message names no file, the caller does."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    dtype: str
    """As safetensors names it: BF16, F32 ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One safetensors file whose size agrees with its header."""

    path: Path
    size: int
    data_start: int
    """Where the header ends and the tensors' bytes begin."""
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> WeightsFile:
    """Read and check a header. Raises BadWeightsFile for a truncated, padded or garbled file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadWeightsFile(f"truncated: {size} bytes, not even a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER:
            raise BadWeightsFile("not a safetensors file (its header length is absurd)")
        if 8 + length > size:
            raise BadWeightsFile(f"truncated: the header alone needs {8 + length} bytes, the file has {size}")
        raw = file.read(length)
    tensors, metadata = _parse(raw, 8 + length)
    end = end_of(tensors, 8 + length)
    if end > size:
        raise BadWeightsFile(f"truncated: its header promises {end} bytes, the file has {size}")
    if end < size:
        raise BadWeightsFile(f"altered: {size - end} bytes more than its header promises")
    return WeightsFile(path=path, size=size, data_start=8 + length, tensors=tensors, metadata=metadata)


def _parse(raw: bytes, data_start: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        return parse_tensors(header, data_start), {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeightsFile(f"not a safetensors file (its header cannot be read: {error})") from error


def parse_tensors(header: Mapping[str, Any], data_start: int) -> dict[str, TensorInfo]:
    """The tensors of a header's JSON. Raises BadWeightsFile where they leave gaps or overlap, and what malformed
    entries raise: ValueError, KeyError, TypeError or AttributeError."""
    tensors = {name: _tensor(entry, data_start) for name, entry in header.items()}
    place = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != place:
            raise BadWeightsFile(f"altered: tensor {name!r} overlaps its neighbour or leaves a gap")
        place += info.nbytes
    return tensors


def end_of(tensors: Mapping[str, TensorInfo], data_start: int) -> int:
    """Where the last tensor's bytes end."""
    return max((info.start + info.nbytes for info in tensors.values()), default=data_start)


def _tensor(entry: dict, data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a negative or fractional size")
    if len(shape) > MOST_DIMENSIONS or max(begin, end, *shape, 0) > LARGEST_NUMBER:
        raise ValueError("an absurd size")
    if dtype not in ITEM_BITS:
        raise BadWeightsFile(
            f"not readable: its header has the dtype {dtype!r:.40}, which weights of Z-Image do not have"
        )
    if (end - begin) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{dtype} of shape {list(shape)} does not take {end - begin} bytes")
    return TensorInfo(dtype, shape, data_start + begin, end - begin)


Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""name -> (safetensors dtype, shape), in the order in which their bytes are stored."""


def header_bytes(tensors: Tensors, metadata: dict[str, str], size: int | None = None) -> bytes:
    """A file's bytes up to the first tensor's: ``size`` of them, which must be enough, or a multiple of ALIGNMENT."""
    header: dict[str, object] = {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    room = -(8 + len(text)) % ALIGNMENT if size is None else size - 8 - len(text)
    assert room >= 0, (size, len(text))
    text += b" " * room
    return struct.pack("<Q", len(text)) + text


def create(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, int]:
    """Create a file with a header for ``tensors`` and room for their bytes. Returns the file offset of each one's.

    The space is reserved at once, so a full disk shows here: OSError.
    """
    header = header_bytes(tensors, metadata)
    sizes = [_nbytes(dtype, shape) for dtype, shape in tensors.values()]
    with path.open("xb") as file:
        file.write(header)
        file.flush()
        if any(sizes):
            os.posix_fallocate(file.fileno(), len(header), sum(sizes))
    return dict(zip(tensors, itertools.accumulate(sizes, initial=len(header))))


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BITS[dtype] // 8
