"""Weights to pack: of every size, usual ones and special ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from zimage_runner.weights.packed.format import BLOCK, Counts, Frame, frame_bytes

Values = NDArray[np.uint16]
SIZES = [1, 2, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77, 257 * BLOCK + 3]
SPECIAL = {
    "zeros": [0],
    "negative zeros": [0x8000],
    "denormals": [1, 0x7F, 0x80, 0x8001],
    "infinities and NaN": [0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FC0],
    "smallest and largest exponents": [0, 0x7F80, 0x0080, 0x7F00],
    "ones": [0x3F80, 0xBF80],
}


def frame_of(values: Values, counts: Counts | None) -> Frame:
    return Frame(0, frame_bytes(len(values), counts), 0, len(values), counts)


def normal(count: int, scale: float = 0.02) -> Values:
    drawn = np.random.default_rng(count).standard_normal(count).astype(np.float32) * scale
    return torch.from_numpy(drawn).bfloat16().view(torch.int16).numpy().view(np.uint16)
