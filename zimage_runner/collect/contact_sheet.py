"""Contact sheets: pictures side by side, each with its prompt and seed below."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from zimage_runner.collect.fonts import Font, font_for
from zimage_runner.collect.pictures import Picture
from zimage_runner.collect.sheet import ELLIPSIS, GAP, LINE, clean, drawable, shrunk, size_of, wrapped
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import unfit_target

log = logging.getLogger(__name__)

CAPTION_LINES = 2
"""Of the prompt; the seed has one of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a page is filled: pictures across, pictures down, and the most pixels of a picture's longer side."""

    columns: int = 8
    rows: int = 8
    tile: int = 192


def draw_sheets(file: Path, pictures: Sequence[Picture], layout: Layout) -> Iterator[Path]:
    """Write page after page and yield their paths: ``file`` itself, then FILE_2.png, FILE_3.png ..."""
    if file.suffix.lower() != ".png":
        raise UserError(f"sheet={file}: contact sheets are PNG: use sheet={file.with_suffix('.png')}")
    if (kind := unfit_target(file)) is not None:
        what = "name a file in it" if kind == "a folder" else "only plain files are replaced: name another file"
        raise UserError(f"sheet={file} is {kind}: {what}")
    file.parent.mkdir(parents=True, exist_ok=True)
    per_page = layout.columns * layout.rows
    for start in range(0, len(pictures), per_page):
        number = start // per_page + 1
        path = file if number == 1 else file.with_stem(f"{file.stem}_{number}")
        page = io.BytesIO()
        _page(pictures[start : start + per_page], layout).save(page, "PNG")
        atomic.replace_file(path, page.getvalue())
        yield path


def _page(pictures: Sequence[Picture], layout: Layout) -> Image.Image:
    captions = [_caption(picture) for picture in pictures]
    font = font_for([prompt for prompt, _ in captions])
    columns, tile = min(layout.columns, len(pictures)), min(layout.tile, _longest_side(pictures))
    pitch_x, pitch_y = tile + GAP, tile + GAP + LINE * (CAPTION_LINES + 1)
    size = (columns * pitch_x + GAP, math.ceil(len(pictures) / columns) * pitch_y + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    hidden = [picture for picture, (prompt, _) in zip(pictures, captions, strict=True) if not is_shown(prompt, font)]
    if hidden:
        log.warning(
            "no font here shows every letter of %d of the sheet's captions (the first is %s): install one that does "
            "(Noto Sans CJK, WenQuanYi ...), or read the prompts with into=FOLDER",
            len(hidden),
            hidden[0].path,
        )
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = GAP + n % columns * pitch_x, GAP + n // columns * pitch_y
        if (image := shrunk(picture.image, (tile, tile))) is not None:
            sheet.paste(image, (left + (tile - image.width) // 2, top + (tile - image.height) // 2))
        _write(pen, (left, top + tile), caption, tile, font)
    return sheet


def is_shown(text: str, font: Font) -> bool:
    """Whether the font has a picture of each letter."""
    return drawable(text, font) == clean(text)


def _longest_side(pictures: Sequence[Picture]) -> int:
    return max((max(size) for picture in pictures if (size := size_of(picture.image)) is not None), default=1)


def _caption(picture: Picture) -> tuple[str, str]:
    record = picture.record()
    return str(record.get("prompt", "")), f"{picture.index}, seed {record.get('seed')}"


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], caption: tuple[str, str], width: int, font: Font) -> None:
    prompt, seed = caption
    if not drawable(prompt, font).strip(f"{ELLIPSIS} "):  # no font of the machine's has any of it
        prompt = ""
    lines = [*wrapped(prompt, width, CAPTION_LINES, font), *wrapped(seed, width, 1, font)]
    for n, line in enumerate(lines):
        pen.text((place[0], place[1] + n * LINE), line, "black", font)
