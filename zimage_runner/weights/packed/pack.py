"""Packing a frame of weights: see packed.py for the format. numpy alone; the large operations let go of the GIL."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zimage_runner.weights.packed.format import BLOCK, Counts, frame_bytes

Bytes = NDArray[np.uint8]

SAMPLE = 16
"""Every so many values of a block decide its top."""
SAVED = {0: 10, 1: 12, 2: 12, 3: 12, 4: 10, 5: 10, 6: 8, 7: 8, 8: 8}
"""Bits that a value at this distance takes less than one that goes through all levels."""


def pack_frame(values: NDArray[np.uint16]) -> tuple[Bytes, Counts | None]:
    """The frame's bytes, and its counts; None where it is stored as it is, since packing would not make it smaller."""
    exponents = (values >> 7).astype(np.uint8)
    tops, distances = _distances(exponents)
    mantissas = ((values >> 8) & 0x80 | values & 0x7F).astype(np.uint8)

    codes1 = np.minimum(distances - np.uint8(1), np.uint8(3))  # a distance of 0 wraps around
    open1 = codes1 == 3
    left2 = np.compress(open1, distances)
    codes2 = np.minimum(np.maximum(left2, np.uint8(3)) - np.uint8(3), np.uint8(3))
    open2 = codes2 == 3
    left3 = np.compress(open2, left2)
    codes3 = np.minimum(left3 - np.uint8(6), np.uint8(3))
    open3 = codes3 == 3
    far = np.compress(open3, left3)

    counts = (len(left2), len(left3), len(far))
    if frame_bytes(len(values), counts) >= values.nbytes:
        return values.view(np.uint8), None
    starts2 = _before(np.count_nonzero(_blocks(open1), axis=1))
    starts3 = _before(open2)[starts2]
    starts4 = _before(open3)[starts3]
    table = np.stack([tops, starts2[:-1], starts3[:-1], starts4[:-1]], axis=1).astype("<u4")
    levels = [_packed(codes) for codes in (codes1, codes2, codes3)]
    return np.concatenate([table.reshape(-1).view(np.uint8), mantissas, *levels, far]), counts


def _distances(exponents: Bytes) -> tuple[Bytes, Bytes]:
    """(the top that suits each block best, each exponent's distance from its block's)."""
    blocks = _blocks(exponents, fill=exponents[-1])
    sample = blocks[:, ::SAMPLE]
    # A block's numbers are its own 256, so that one count counts them all.
    numbers = (np.arange(len(blocks), dtype=np.int32)[:, None] << 8) + sample
    histogram = np.bincount(numbers.reshape(-1), minlength=256 * len(blocks)).reshape(-1, 256)
    saved = sum(np.roll(histogram, distance, axis=1) * bits for distance, bits in SAVED.items())
    tops = np.argmax(saved, axis=1).astype(np.uint8)
    return tops, (tops[:, None] - blocks).reshape(-1)[: len(exponents)]


def _blocks(array: NDArray, fill: int | np.uint8 = 0) -> NDArray:
    """[blocks, BLOCK]; what the last one lacks is filled up."""
    missing = -len(array) % BLOCK
    if missing:
        array = np.concatenate([array, np.full(missing, fill, array.dtype)])
    return array.reshape(-1, BLOCK)


def _before(counts: NDArray) -> NDArray[np.int64]:
    """Sums of what comes before each element, and before the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _packed(codes: Bytes) -> Bytes:
    """Four codes a byte, the first in the lowest bits."""
    missing = -len(codes) % 4
    if missing:
        codes = np.concatenate([codes, np.zeros(missing, np.uint8)])
    words = np.ascontiguousarray(codes).view("<u4")
    return (words | words >> 6 | words >> 12 | words >> 18).astype(np.uint8)
