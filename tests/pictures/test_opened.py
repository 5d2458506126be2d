"""Picture files as people have them: made upright RGB, or refused in a line that says what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from zimage_runner.errors import UserError
from zimage_runner.pictures.opened import InputChanged, examine, load, upright, white_where_transparent
from zimage_runner.sampling import Picture


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def corner(size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Grey with a red pixel at the upper left."""
    image = Image.new("RGB", size, (100, 100, 100))
    image.putpixel((0, 0), (255, 0, 0))
    return image


def test_a_camera_s_rotation_is_done() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = upright(encoded(corner(), exif=exif))
    assert image.size == (8, 12)
    assert image.getpixel((7, 0)) == (255, 0, 0)


def test_transparency_lies_on_white_and_of_a_mask_on_black() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((1, 1), (255, 255, 255, 255))
    assert upright(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    mask = upright(encoded(clear), is_mask=True)
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((1, 1))) == ("L", 0, 255)


def test_sixteen_bits_become_eight() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 90, 65535]], np.uint16).repeat(2, axis=0))
    image = upright(encoded(grey))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (90, 90, 90), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = upright(encoded(Image.new("RGB", (4, 4), "white").convert(mode)))
    assert (image.mode, image.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_a_palette_s_clear_entry_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert upright(encoded(image, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_colours_of_another_profile_become_srgb_s() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert upright(encoded(corner(), icc_profile=lab)).getpixel((0, 0)) == (255, 0, 0)
    assert upright(encoded(corner(), icc_profile=b"no profile")).getpixel((0, 0)) == (255, 0, 0)


def test_the_photo_of_a_phone_s_file_is_its_first_picture() -> None:
    data = encoded(corner(), "MPO", save_all=True, append_images=[Image.new("RGB", (12, 8), "blue")])
    assert upright(data).size == (12, 8)


def bomb() -> bytes:
    """A small PNG whose header says that it is huge."""
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


REFUSED = {
    "text": (b"a text", "cannot be read as a PNG, JPEG, WebP, TIFF, BMP or GIF picture"),
    "cut off": (encoded(Image.effect_noise((64, 64), 90).convert("RGB"))[:2000], "cannot be read as a"),
    "animated": (
        encoded(corner(), "GIF", save_all=True, append_images=[Image.new("RGB", (12, 8), "blue")]),
        "has 2 frames: save the one to start from as a picture of its own",
    ),
    "pages": (
        encoded(corner(), "TIFF", save_all=True, append_images=[Image.new("RGB", (12, 8), "blue")]),
        "has 2 pages: save the one",
    ),
    "CMYK": (encoded(corner().convert("CMYK"), "JPEG"), "is in printing colours (CMYK): save it as RGB"),
    "float": (encoded(Image.new("F", (4, 4)), "TIFF"), "is of floating-point values: save it as RGB"),
    "32 bits": (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "has 32 bits a pixel: save it with 8"),
    "bomb": (bomb(), "unpacks to more than 100,000,000 pixels: make it smaller"),
    "strip": (encoded(Image.new("L", (100, 2))), "is a strip of 100x2 pixels: use one whose sides are within 1:16"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    data, told = REFUSED[kind]
    file = tmp_path / "picture"
    file.write_bytes(data)
    with pytest.raises(UserError) as refused:
        examine(str(file), "t.csv:3: image")
    assert str(refused.value).startswith(f"t.csv:3: image={file} {told}")
    assert "\n" not in str(refused.value)
    assert "object at 0x" not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, told in ((tmp_path, "is a folder: name a picture file"), (tmp_path / "no.png", "does not exist")):
        with pytest.raises(UserError, match=told):
            examine(str(path), "image")


def test_a_mask_needs_white(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    file.write_bytes(encoded(Image.new("L", (8, 8), 20)))
    with pytest.raises(UserError, match="black throughout"):
        examine(str(file), "mask", is_mask=True)
    assert examine(str(file), "image").width == 8


def test_a_file_that_changes_after_the_plan_is_told(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(corner()))
    picture = examine(str(file), "image")
    assert load(picture).size == (12, 8)
    other = Picture(digest="0" * 64, path=str(file), width=12, height=8)
    with pytest.raises(InputChanged, match="has changed since the run was planned"):
        load(other)
    with pytest.raises(InputChanged, match="does not exist"):
        load(Picture(digest="1" * 64, path=str(tmp_path / "gone.png"), width=1, height=1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_that_is_painted_where_it_is_transparent_becomes_white_there(mode: str) -> None:
    mask = Image.new("RGBA", (8, 4), (255, 255, 255, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 4, 4))
    found = np.asarray(upright(white_where_transparent(encoded(mask.convert(mode))), is_mask=True))
    assert np.array_equal(found, np.repeat(np.array([[255] * 4 + [0] * 4], np.uint8), 4, axis=0))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16", "RGBA"])
def test_a_mask_without_a_transparent_place_is_refused(mode: str) -> None:
    opaque = Image.new(mode, (8, 4), (0, 0, 0, 255) if mode == "RGBA" else 0)
    with pytest.raises(UserError, match="is transparent nowhere, so nothing would be painted"):
        white_where_transparent(encoded(opaque))
