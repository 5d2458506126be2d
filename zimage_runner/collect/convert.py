"""Pictures in another format, for data sets that need no PNG: smaller files, what they say about themselves kept."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.metadata import read_metadata

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp"}
LOSSLESS = "lossless"
LONGEST_COMMENT = 30_000
"""Characters of two bytes: JPEG has room for 64 kB of EXIF data."""
USUAL_QUALITY = 90
EXIF_POINTER, USER_COMMENT = 0x8769, 0x9286
"""Where image tools look for generation parameters in files that have no text chunks (EXIF 2.32, 4.6.3 and 4.6.5)."""


@dataclass(frozen=True, slots=True)
class Format:
    """What pictures become."""

    name: str = "png"
    quality: int | None = None
    """1 to 100; None: no loss."""

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.name]

    @property
    def converts(self) -> bool:
        return self.suffix != ".png"


def parse_format(name: str, quality: str | None) -> Format:
    """``format=`` and ``quality=`` of a command line. Raises UserError."""
    if name not in SUFFIXES:
        raise UserError(f"format={name}: write png, jpeg or webp")
    if SUFFIXES[name] == ".png":
        if quality is not None:
            raise UserError(
                f"quality={quality} has no effect on PNG, which loses nothing: add format=jpeg or format=webp"
            )
        return Format()
    if quality == LOSSLESS and name == "webp":
        return Format(name)
    if quality is None:
        return Format(name, USUAL_QUALITY)
    if not (quality.isascii() and quality.isdigit() and 1 <= int(quality) <= 100):
        or_lossless = f" or {LOSSLESS}" if name == "webp" else ""
        raise UserError(f"quality={quality}: write a whole number from 1 to 100{or_lossless}")
    return Format(name, int(quality))


def convert(source: BinaryIO, target: Path, format: Format) -> None:
    """Write ``source`` (an open PNG file) as ``target``, whole or not at all.

    It takes over the time of the last change, by which it is known again.
    """
    exif = _exif(source)
    how: dict[str, Any] = {"lossless": True} if format.quality is None else {"quality": format.quality}
    if format.suffix == ".jpg":
        how["subsampling"] = "4:4:4"  # half the colour's resolution would blur red edges
    converted = io.BytesIO()
    source.seek(0)
    with Image.open(source) as image:
        image.convert("RGB").save(converted, "JPEG" if format.suffix == ".jpg" else "WEBP", exif=exif, **how)
    atomic.replace_file(target, converted.getvalue(), changed_ns=os.fstat(source.fileno()).st_mtime_ns)


def _exif(source: BinaryIO) -> Image.Exif:
    """The picture's parameters as EXIF's user comment."""
    exif = Image.Exif()
    text = read_metadata(source).parameters
    if text:
        exif.get_ifd(EXIF_POINTER)[USER_COMMENT] = b"UNICODE\0" + text[:LONGEST_COMMENT].encode("utf-16-be")
    return exif
