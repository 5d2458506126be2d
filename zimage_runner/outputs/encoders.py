"""Pixels to files of each format, and the test of whether pixels are a picture at all."""

from __future__ import annotations

import abc
import hashlib
import io
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from PIL import Image

from zimage_runner.errors import BadPictureError
from zimage_runner.outputs.config import LOSSLESS, USUAL_QUALITY, Format, Output
from zimage_runner.outputs.metadata import Metadata, exif, parameters_text, png_info, read_metadata

if TYPE_CHECKING:
    import numpy as np

PILLOWS_CHOICE = -1


class Encoder(abc.ABC):
    """Writes one format. Subclasses are found by ``format``."""

    format: ClassVar[Format]
    of_format: ClassVar[dict[Format, type[Encoder]]] = {}

    def __init_subclass__(cls) -> None:
        Encoder.of_format[cls.format] = cls

    @abc.abstractmethod
    def save(self, image: Image.Image, file: BinaryIO, said: Metadata | None, output: Output) -> None:
        """Write an RGB image and what it says of itself."""


class Png(Encoder):
    """As PNG, without loss; metadata in text chunks."""

    format = Format.png

    def save(self, image: Image.Image, file: BinaryIO, said: Metadata | None, output: Output) -> None:
        level = output.png_compress_level
        # After PNG's filters a photograph repeats itself in runs alone: looking for more finds chance repetitions of a
        # few bytes, whose codes are longer than what they replace.
        strategy = zlib.Z_RLE if level == 1 else PILLOWS_CHOICE
        info = None if said is None else png_info(said)
        image.save(file, "PNG", compress_level=level, compress_type=strategy, pnginfo=info)


class Jpeg(Encoder):
    """As JPEG with colours at full resolution: half of it would blur red edges."""

    format = Format.jpeg

    def save(self, image: Image.Image, file: BinaryIO, said: Metadata | None, output: Output) -> None:
        quality = output.quality or USUAL_QUALITY
        image.save(file, "JPEG", quality=quality, subsampling="4:4:4", exif=exif(said))


class Webp(Encoder):
    """As WebP, lossless if asked."""

    format = Format.webp

    def save(self, image: Image.Image, file: BinaryIO, said: Metadata | None, output: Output) -> None:
        lossless = output.quality == LOSSLESS
        how = {"lossless": True} if lossless else {"quality": output.quality or USUAL_QUALITY}
        image.save(file, "WEBP", exif=exif(said), **how)


def encode(pixels: np.ndarray, recipe: Mapping[str, Any], output: Output) -> bytes:
    """Return the file of uint8 [height, width, 3] in ``output.format``.

    The same pixels, recipe and options give the same bytes. ``recipe`` is writer.PictureJob's.
    """
    said = None
    if output.metadata:
        recipe = dict(recipe)
        if output.format is not Format.png:  # what was drawn, which the file may not hold
            recipe["pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        said = Metadata(parameters_text(recipe), recipe)
    return _encoded(Image.fromarray(pixels), said, output)


def convert(source: BinaryIO, output: Output) -> bytes:
    """Return an open picture file in ``output.format``, with what it says of itself."""
    said = read_metadata(source)
    source.seek(0)
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    if said.recipe is not None:
        said.recipe.setdefault("pixels_sha256", hashlib.sha256(image.tobytes()).hexdigest())
    return _encoded(image, said if output.metadata else None, output)


def _encoded(image: Image.Image, said: Metadata | None, output: Output) -> bytes:
    buffer = io.BytesIO()
    Encoder.of_format[output.format]().save(image, buffer, said, output)
    return buffer.getvalue()


def check_pixels(pixels: np.ndarray, *, allow_constant: bool) -> None:
    """Raise BadPictureError for a picture of a single colour, which is how overflow shows after rounding."""
    if allow_constant:
        return
    first = pixels[0, 0]
    if (pixels == first).all():
        raise BadPictureError(f"the picture is of one colour throughout, rgb({', '.join(map(str, first))})")
