"""Drawing a page of pictures with a title, column labels and row labels. Labels wrap; an ellipsis ends what is cut."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from zimage_runner.collect.fonts import Font, can_show, font_for
from zimage_runner.errors import error_text
from zimage_runner.outputs.beneath import Inside, NotPlain
from zimage_runner.outputs.metadata import READABLE

log = logging.getLogger(__name__)

MAX_TILES = 2500
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
HIDDEN = "\0"
_BREAKS = re.compile(r"[ =_/,.;:-]")
"""A line ends best after one of these: blanks, and what field names, paths and lists are made of."""


@dataclass(kw_only=True, slots=True)
class Page:
    """Pictures by (row, column)."""

    title: str
    name: str
    rows: list[str]
    columns: list[str]
    pictures: dict[tuple[int, int], Inside] = field(default_factory=dict)

    @property
    def font(self) -> Font:
        """One for all of the page's texts."""
        return font_for([self.title, *self.rows, *self.columns])


def draw(page: Page, tile: int) -> Image.Image:
    """The page as one picture; no tile is larger than ``tile`` pixels, and fewer fit when there are very many."""
    rows = page.rows[: max(1, MAX_TILES // max(1, len(page.columns)))]
    columns = page.columns[:MAX_TILES]
    side_x, side_y = _tile_size(page, tile)
    pitch_x, pitch_y = max(side_x, MIN_COLUMN) + GAP, side_y + GAP
    width = LABEL_WIDTH + len(columns) * pitch_x + GAP
    font = page.font
    title = wrapped(page.title, width - 2 * GAP, TITLE_LINES, font)
    labels = [wrapped(text, pitch_x - 3 * GAP, COLUMN_LINES, font) for text in columns]
    head = GAP + LINE * len(title)
    top = head + LINE * max(map(len, labels), default=0) + GAP
    sheet = Image.new("RGB", (width, top + len(rows) * pitch_y), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, (GAP, GAP), title, font)
    for n, lines in enumerate(labels):
        _write(pen, (LABEL_WIDTH + n * pitch_x, head), lines, font)
    for n, text in enumerate(rows):
        lines = wrapped(text, LABEL_WIDTH - 2 * GAP, max(1, side_y // LINE), font)
        _write(pen, (GAP, top + n * pitch_y), lines, font)
    for (row, column), file in page.pictures.items():
        is_shown = row < len(rows) and column < len(columns)
        if is_shown and (picture := shrunk(file, (side_x, side_y))) is not None:
            sheet.paste(picture, (LABEL_WIDTH + column * pitch_x, top + row * pitch_y))
    return sheet


def shrunk(file: Inside, size: tuple[int, int]) -> Image.Image | None:
    """A picture in RGB that fits into (width, height); None, with a warning, where the file is no whole picture."""
    try:
        with file.open() as stream, Image.open(stream, formats=READABLE) as picture:
            picture.thumbnail(size, Image.Resampling.LANCZOS)
            return picture.convert("RGB")
    except NotPlain:
        raise
    except Exception as error:  # whatever Pillow makes of damaged bytes
        log.warning("%s is left out, it cannot be read: %s", file.path, error_text(error))
        return None


def size_of(file: Inside) -> tuple[int, int] | None:
    """(width, height) of a picture, from its header; None where it has none. Raises NotPlain for a link."""
    try:
        with file.open() as stream, Image.open(stream, formats=READABLE) as picture:
            return picture.size
    except NotPlain:
        raise
    except Exception:  # told of when it is drawn
        return None


def _tile_size(page: Page, tile: int) -> tuple[int, int]:
    """The largest picture's size, scaled down to the tile."""
    sizes = [size for file in page.pictures.values() if (size := size_of(file)) is not None] or [(tile, tile)]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    scale = min(1.0, tile / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    x, y = place
    for n, line in enumerate(lines):
        pen.text((x, y + n * LINE), line, "black", font)


def wrapped(text: str, width: int, lines: int, font: Font) -> list[str]:
    """At most ``lines`` pieces of at most ``width`` pixels; an ellipsis ends the last one when text is left over."""
    rest = drawable(text, font)
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


def drawable(text: str, font: Font) -> str:
    """The text as far as the font can show it; an ellipsis stands for a stretch that it cannot."""
    return re.sub(f"{HIDDEN}+", ELLIPSIS, "".join(c if can_show(font, c) else HIDDEN for c in clean(text)))


def clean(text: str) -> str:
    """Its first 500 characters, with a blank for what is none to be seen."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]
