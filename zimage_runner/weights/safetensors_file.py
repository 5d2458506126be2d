"""Reading safetensors headers: names, dtypes, shapes and places, without any tensor's bytes and without torch.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""The format's own bound on the header, in bytes."""
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
    if (end - begin) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{dtype} of shape {list(shape)} does not take {end - begin} bytes")
    return TensorInfo(dtype, shape, data_start + begin, end - begin)
