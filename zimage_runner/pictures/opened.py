"""Picture files of others as upright RGB in sRGB: checked when a run is planned, read again when they are drawn."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zimage_runner.errors import UserError, error_text, one_line
from zimage_runner.sampling import Picture

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
"""Pillow's names of the formats that are opened."""
MOST_BYTES = 512 * 2**20
MOST_PIXELS = 100_000_000
"""A file of few bytes may unpack to more memory than there is."""
MOST_STRETCHED = 16
"""A side that is so many times the other is a strip: no model draws it."""


class InputChanged(RuntimeError):
    """A file that a run was planned with is gone or another one now: the item fails."""


def examine(path: str, where: str, *, is_mask: bool = False) -> Picture:
    """Read a file whole and check that it can be drawn from. ``where`` begins each message: a row and its field.

    Raises UserError for what is missing, unreadable, animated, not in colours of a screen, too large or a strip, and
    for a mask that is black throughout.
    """
    data = _read(path, where)
    try:
        image = upright(data, is_mask=is_mask)
    except UserError as error:
        raise UserError(f"{where}={one_line(path, 200)} {error}") from None
    if is_mask and cast("tuple[int, int]", image.getextrema())[1] < 128:
        raise UserError(
            f"{where}={one_line(path, 200)} is black throughout, so nothing would be painted: white is what changes"
        )
    return Picture(digest=hashlib.sha256(data).hexdigest(), path=path, width=image.width, height=image.height)


def load(picture: Picture, *, is_mask: bool = False) -> Image.Image:
    """The picture as RGB, a mask as L, in the size that it is looked at. Raises InputChanged."""
    return _load(picture, is_mask)


@functools.lru_cache(maxsize=4)  # seeds of one picture come one after another
def _load(picture: Picture, is_mask: bool) -> Image.Image:
    try:
        data = _read(picture.path, "")
    except UserError as error:
        raise InputChanged(f"{picture.path} {error}") from None
    if hashlib.sha256(data).hexdigest() != picture.digest:
        raise InputChanged(f"{picture.path} has changed since the run was planned (another sha256)")
    try:
        return upright(data, is_mask=is_mask)
    except UserError as error:
        raise InputChanged(f"{picture.path} {error}") from None


def _read(path: str, where: str) -> bytes:
    """The file's bytes. Raises UserError, which with ``where`` names the file."""
    name = f"{where}={one_line(path, 200)} " if where else ""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a named pipe would be waited for
            what = "is a folder" if stat.S_ISDIR(found.st_mode) else "is no plain file"
            raise UserError(f"{name}{what}: name a picture file")
        if found.st_size > MOST_BYTES:
            raise UserError(f"{name}has {found.st_size:,} bytes: use a file of at most {MOST_BYTES:,}")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{name}cannot be read: {getattr(error, 'strerror', None) or error}") from None


def upright(data: bytes, *, is_mask: bool = False) -> Image.Image:
    """Decode a file's bytes: RGB, or L for a mask, after its camera's rotation.

    Transparency lies on white, of a mask on black; 16 bits become 8; colours of another profile become sRGB's. Raises
    UserError that says what is wrong, without the file's name.
    """
    from PIL import ImageOps

    with _opened(data) as image:
        image.load()
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        return _flat(image, "L") if is_mask else _in_srgb(_flat(image, "RGB"), image.mode, profile)


def size_in_header(data: bytes) -> tuple[int, int]:
    """Width and height of a file's bytes, none of whose pixels are decoded. Raises UserError as ``upright`` does."""
    with _opened(data) as image:
        return image.size


def white_where_transparent(data: bytes) -> bytes:
    """A mask's file whose transparent places are painted, as OpenAI has it, as a PNG that is white there.

    Raises UserError as ``upright`` does, and for a mask without a transparent place.
    """
    from PIL import ImageChops, ImageOps

    with _opened(data) as image:
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    mask = ImageChops.invert(alpha)
    if cast("tuple[int, int]", mask.getextrema())[1] < 128:
        raise UserError("is transparent nowhere, so nothing would be painted: what is transparent changes")
    stream = io.BytesIO()
    mask.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A file's picture, its header checked and its pixels not decoded yet. Errors of the block are told like its own.

    Raises UserError that says what is wrong, without the file's name.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, broken EXIF and the like: checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width, image.height)
                _check_kind(image)
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"unpacks to more than {MOST_PIXELS:,} pixels: make it smaller") from None
    except Exception as error:  # Pillow has many more than its own for bytes that are no picture
        kinds = "PNG, JPEG, WebP, TIFF, BMP or GIF"
        # Pillow names the stream by its address, and says nothing more of what is no picture at all.
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({one_line(error_text(error), 120)})"
        raise UserError(f"cannot be read as a {kinds} picture{why}") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(f"has {width}x{height} pixels: use one of at most {MOST_PIXELS:,}")
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise UserError(f"is a strip of {width}x{height} pixels: use one whose sides are within 1:{MOST_STRETCHED}")


def _check_kind(image: Image.Image) -> None:
    # Many phones write several pictures into a .jpg (MPO): the first is the photo.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        what = "pages" if image.format == "TIFF" else "frames"
        raise UserError(f"has {frames} {what}: save the one to start from as a picture of its own")
    if image.mode in ("CMYK", "LAB", "F"):
        what = {"CMYK": "in printing colours (CMYK)", "LAB": "in Lab colours", "F": "of floating-point values"}
        raise UserError(f"is {what[image.mode]}: save it as RGB")


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """One of L or RGB, of whatever mode."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = image.convert("I")
        if cast("tuple[int, int]", image.getextrema())[1] > 65535:
            raise UserError("has 32 bits a pixel: save it with 8")
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "black" if mode == "L" else "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB").convert(mode)


def _in_srgb(image: Image.Image, mode: str, profile: Any) -> Image.Image:
    """The picture's colours as sRGB says them, where a profile for RGB is in the file and can be read."""
    if not isinstance(profile, bytes) or mode not in ("RGB", "RGBA", "P"):
        return image
    try:
        from PIL import ImageCms
    except ImportError:  # a Pillow without LittleCMS
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"))
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return image  # a profile that is damaged, or not for RGB
    return image if converted is None else converted
