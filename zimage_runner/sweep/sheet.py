"""Drawing a page of pictures with a title, column labels and row labels. Labels wrap; an ellipsis ends what is cut."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MAX_TILES = 2500
FONT_SIZE = 14
LINE = 20
"""Pixels from one line of text to the next."""
GAP = 4
LABEL_WIDTH = 160
"""Of row labels."""
MIN_COLUMN = 96
"""Pixels; labels of narrower columns would be cut after a few letters."""
COLUMN_LINES = 3
TITLE_LINES = 2
ELLIPSIS = "..."
FONT_DIRS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/System/Library/Fonts")
CJK_FONTS = ("NotoSansCJK*", "NotoSansSC*", "SourceHanSans*", "wqy-*", "DroidSansFallback*", "PingFang*", "STHeiti*")
_BREAKS = re.compile(r"[ =_/,.;:-]")
"""A line ends best after one of these: blanks, and what field names, paths and lists are made of."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(kw_only=True, slots=True)
class Page:
    """Pictures by (row, column)."""

    title: str
    name: str
    rows: list[str]
    columns: list[str]
    pictures: dict[tuple[int, int], Path] = field(default_factory=dict)


def draw(page: Page, tile: int) -> Image.Image:
    """The page as one picture; no tile is larger than ``tile`` pixels, and fewer fit when there are very many."""
    rows = page.rows[: max(1, MAX_TILES // max(1, len(page.columns)))]
    columns = page.columns[:MAX_TILES]
    side_x, side_y = _tile_size(page, tile)
    pitch_x, pitch_y = max(side_x, MIN_COLUMN) + GAP, side_y + GAP
    width = LABEL_WIDTH + len(columns) * pitch_x + GAP
    title = wrapped(page.title, width - 2 * GAP, TITLE_LINES)
    labels = [wrapped(text, pitch_x - 3 * GAP, COLUMN_LINES) for text in columns]
    head = GAP + LINE * len(title)
    top = head + LINE * max(map(len, labels), default=0) + GAP
    sheet = Image.new("RGB", (width, top + len(rows) * pitch_y), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, (GAP, GAP), title)
    for n, lines in enumerate(labels):
        _write(pen, (LABEL_WIDTH + n * pitch_x, head), lines)
    for n, text in enumerate(rows):
        _write(pen, (GAP, top + n * pitch_y), wrapped(text, LABEL_WIDTH - 2 * GAP, max(1, side_y // LINE)))
    for (row, column), path in page.pictures.items():
        if row < len(rows) and column < len(columns):
            with Image.open(path) as picture:
                picture.thumbnail((side_x, side_y), Image.Resampling.LANCZOS)
                sheet.paste(picture.convert("RGB"), (LABEL_WIDTH + column * pitch_x, top + row * pitch_y))
    return sheet


def _tile_size(page: Page, tile: int) -> tuple[int, int]:
    """The largest picture's size, scaled down to the tile."""
    sizes = []
    for path in page.pictures.values():
        with Image.open(path) as picture:
            sizes.append(picture.size)
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    scale = min(1.0, tile / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str]) -> None:
    x, y = place
    for n, line in enumerate(lines):
        clean, font = _drawable(line)
        pen.text((x, y + n * LINE), clean, "black", font)


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """At most ``lines`` pieces of at most ``width`` pixels; an ellipsis ends the last one when text is left over."""
    rest, font = _drawable(text)
    pieces: list[str] = []
    while rest and len(pieces) < lines:
        end = _fitting(rest, font, width)
        if end < len(rest) and len(pieces) == lines - 1:
            end = _fitting(rest, font, width - int(font.getlength(ELLIPSIS)))
            return [*pieces, rest[:end].rstrip() + ELLIPSIS]
        end = _break_before(rest, end)
        pieces.append(rest[:end].strip())
        rest = rest[end:].lstrip()
    return pieces


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters, at least one, are at most ``width`` pixels wide."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _break_before(text: str, end: int) -> int:
    """Where to break a line that may hold ``end`` characters: after a word if that leaves a third of it full."""
    if end >= len(text) or text[end] == " ":
        return end
    ends = [match.end() for match in _BREAKS.finditer(text, 0, end)]
    return ends[-1] if ends and ends[-1] >= end // 3 else end


def _drawable(text: str) -> tuple[str, Font]:
    """Text and a font that can show it; without a font for it, what is not Latin becomes a dot."""
    clean = "".join(c if c.isprintable() else " " for c in text)[:500]
    latin = ImageFont.load_default(FONT_SIZE)
    if all(c < "\u0180" for c in clean):
        return clean, latin
    wide = _cjk_font()
    if wide is not None:
        return clean, wide
    return "".join(c if c < "\u0180" else "·" for c in clean), latin


@functools.lru_cache(maxsize=1)
def _cjk_font() -> ImageFont.FreeTypeFont | None:
    for folder, pattern in itertools.product(FONT_DIRS, CJK_FONTS):
        for path in sorted(Path(folder).expanduser().glob(f"**/{pattern}")):
            try:
                return ImageFont.truetype(str(path), FONT_SIZE)
            except OSError:
                continue
    return None
