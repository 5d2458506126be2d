"""Writing a safetensors file piece by piece, so that no more than a piece is ever in memory.

The library's own writer wants every tensor at once. The tensors' bytes begin at a multiple of 4096 (the format allows
spaces after the header's JSON), so that reads straight from the disk are aligned.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from zimage_runner.weights.safetensors_file import ITEM_BITS

ALIGNMENT = 4096


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
