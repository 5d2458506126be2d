"""Pixels to PNG bytes, and the test of whether pixels are a picture at all."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, Any

from PIL import Image

from zimage_runner.errors import BadPictureError
from zimage_runner.outputs.config import Output
from zimage_runner.outputs.metadata import png_info

if TYPE_CHECKING:
    import numpy as np

PILLOWS_CHOICE = -1


def encode_png(pixels: np.ndarray, recipe: dict[str, Any], output: Output) -> bytes:
    """PNG file of uint8 [height, width, 3]. The same pixels, recipe and options give the same bytes."""
    buffer = io.BytesIO()
    info = png_info(recipe) if output.metadata else None
    level = output.png_compress_level
    # After PNG's filters a photograph repeats itself in runs alone: looking for more finds chance repetitions of a few
    # bytes, whose codes are longer than what they replace.
    strategy = zlib.Z_RLE if level == 1 else PILLOWS_CHOICE
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=level, compress_type=strategy, pnginfo=info)
    return buffer.getvalue()


def check_pixels(pixels: np.ndarray, *, allow_constant: bool) -> None:
    """Raise BadPictureError for a picture of a single colour, which is how overflow shows after rounding."""
    if allow_constant:
        return
    first = pixels[0, 0]
    if (pixels == first).all():
        raise BadPictureError(f"the picture is of one colour throughout, rgb({', '.join(map(str, first))})")
