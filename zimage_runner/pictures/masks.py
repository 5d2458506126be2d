"""Masks of inpainting: widened, softened inwards, and the box around what is painted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FAINT = 8
"""Of 255: darker is black. JPEG leaves specks around what is white."""


def soft_mask(mask: np.ndarray, grow: int, blur: int) -> np.ndarray:
    """Return uint8 [height, width], white where it is painted, as shares float32 0..1.

    ``grow`` widens it by so many pixels; ``blur`` softens its edge inwards, so that what was black stays exactly 0.
    Grey is a share of its own: half of the new picture.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    grown = widened(np.where(mask < FAINT, np.uint8(0), mask), grow)
    shares = grown.astype(np.float32) / 255
    if not blur:
        return shares
    area = Image.fromarray(np.where(grown > 0, np.uint8(255), np.uint8(0)))
    # The picture's own edge is none of the mask's: what is white there goes on beyond it.
    padded = np.pad(np.asarray(area), 2 * blur, mode="edge")
    blurred = np.asarray(Image.fromarray(padded).filter(ImageFilter.GaussianBlur(blur / 2)), dtype=np.float32)
    inner = blurred[2 * blur : -2 * blur, 2 * blur : -2 * blur]
    # Half at the edge: from there to all of it, inside.
    return shares * np.clip(inner / 127.5 - 1, 0, 1)


def widened(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The largest value within ``pixels`` of each pixel, in both directions."""
    import numpy as np

    for _ in range(2):
        columns = mask.shape[1]
        mask = np.pad(mask, ((0, 0), (2 * pixels, 2 * pixels)))
        done = 0
        while done < pixels:  # the largest of 2n + 1 pixels, taken m to either side, is that of 2(n + m) + 1
            step = min(pixels - done, 2 * done + 1)
            mask = np.maximum(mask, np.maximum(np.roll(mask, step, axis=1), np.roll(mask, -step, axis=1)))
            done += step
        mask = mask[:, 2 * pixels : 2 * pixels + columns].T
    return mask


def box_around(mask: np.ndarray, margin: int, ratio: float) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom around what is not 0 with a margin, of the shape width / height = ratio.

    Where the picture ends the box is moved, and where it is too small cut.
    """
    import numpy as np

    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, width, height
    left, right = columns[0] - margin, columns[-1] + 1 + margin
    top, bottom = rows[0] - margin, rows[-1] + 1 + margin
    wide, high = max(right - left, (bottom - top) * ratio), max(bottom - top, (right - left) / ratio)
    left, right = _span((left + right) / 2, wide, width)
    top, bottom = _span((top + bottom) / 2, high, height)
    return left, top, right, bottom


def _span(middle: float, length: float, limit: int) -> tuple[int, int]:
    """A stretch of about ``length`` around ``middle`` within 0..limit."""
    length = min(round(length), limit)
    start = min(max(0, round(middle - length / 2)), limit - length)
    return start, start + length
