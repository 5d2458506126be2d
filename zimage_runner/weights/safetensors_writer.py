"""Writing a safetensors file piece by piece, so that no more than a piece is ever in memory.

The library's own writer wants every tensor at once. The tensors' bytes begin at a multiple of 4096 (the format allows
spaces after the header's JSON), so that reads straight from the disk are aligned.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from zimage_runner.weights.safetensors_header import ITEM_BITS

ALIGNMENT = 4096


def create(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> dict[str, int]:
    """Create a file with a header for ``tensors`` and room for their bytes, stored in the order given.

    ``tensors``: name -> (safetensors dtype, shape). Returns the file offset of each tensor's bytes. The space is
    reserved at once, so a full disk shows here: OSError.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    places: dict[str, int] = {}
    place = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * ITEM_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
        places[name] = place
        place += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        if place:
            os.posix_fallocate(file.fileno(), start, place)
    return {name: start + offset for name, offset in places.items()}
