"""The grid picture of a multirun: columns and rows are two swept fields, prompts and seeds are pages.

With one swept field the rows are the prompts and seeds. Further fields become pages too.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_runner.plan import slug
from zimage_runner.sweep.report import SweptJob

log = logging.getLogger(__name__)

MAX_PAGES = 50
MAX_TILES = 2500
MAX_ROWS = 100
LABEL_HEIGHT = 22
ROW_LABEL_WIDTH = 160
GAP = 4
FONT_SIZE = 14
FONT_DIRS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/System/Library/Fonts")
CJK_FONTS = ("NotoSansCJK*", "NotoSansSC*", "SourceHanSans*", "wqy-*", "DroidSansFallback*", "PingFang*", "STHeiti*")

Item = tuple[int, int]
"""Prompt number and seed."""


@dataclass(kw_only=True, slots=True)
class Page:
    """Pictures by (row, column)."""

    title: str
    name: str
    rows: list[str]
    columns: list[str]
    pictures: dict[tuple[int, int], Path] = field(default_factory=dict)


def write_grids(root: Path, jobs: Sequence[SweptJob], fields: Sequence[str], *, tile: int) -> list[Path]:
    """Draw every page: grid.png when there is one, else grid/*.png. Returns the files."""
    pages = [page for page in layout(jobs, fields) if page.pictures]
    if len(pages) > MAX_PAGES:
        log.warning("the grid has %d pages, the first %d are drawn", len(pages), MAX_PAGES)
    written = []
    for page in pages[:MAX_PAGES]:
        path = root / "grid.png" if len(pages) == 1 else root / "grid" / f"{page.name}.png"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        draw(page, tile).save(temporary, format="PNG", compress_level=1)
        temporary.rename(path)
        written.append(path)
    return written


def layout(jobs: Sequence[SweptJob], fields: Sequence[str]) -> list[Page]:
    """Which picture goes where."""
    items = {job.number: _pictures(job) for job in jobs}
    texts: dict[Item, str] = {}
    for pictures in items.values():
        for item, path in pictures.items():
            texts.setdefault(item, _prompt_of(path))
    by_field = [f for f in fields if f not in ("prompt", "seeds", "prompts.texts")] or list(fields)
    column_field, row_field, rest = by_field[-1], by_field[-2] if len(by_field) > 1 else None, by_field[:-2]
    columns = _values(jobs, column_field)
    pages: dict[tuple[str, ...], Page] = {}
    if row_field is None:
        rows = sorted(texts)[:MAX_ROWS]
        labels = [_item_label(item, texts) for item in rows]
        page = Page(title=column_field, name="all", rows=labels, columns=_labels(column_field, columns))
        for job in jobs:
            column = columns.index(job.overrides.get(column_field, ""))
            for row, item in enumerate(rows):
                if item in items[job.number]:
                    page.pictures.setdefault((row, column), items[job.number][item])
        return [page]
    row_values = _values(jobs, row_field)
    for item, job in itertools.product(sorted(texts), jobs):
        if item not in items[job.number]:
            continue
        others = tuple(f"{f}={job.overrides.get(f, '')}" for f in rest)
        key = (str(item), *others)
        if key not in pages:
            title = "; ".join([_item_label(item, texts), *others])
            name = slug(f"{item[0]:05d} {texts[item]}") + f"_seed_{item[1]}"
            name += "".join(f"_{slug(other)}" for other in others)
            rows = _labels(row_field, row_values)
            pages[key] = Page(title=title, name=name, rows=rows, columns=_labels(column_field, columns))
        place = (
            row_values.index(job.overrides.get(row_field, "")),
            columns.index(job.overrides.get(column_field, "")),
        )
        pages[key].pictures.setdefault(place, items[job.number][item])
    return list(pages.values())


def _values(jobs: Iterable[SweptJob], name: str) -> list[str]:
    return list(dict.fromkeys(job.overrides.get(name, "") for job in jobs))


def _labels(name: str, values: Iterable[str]) -> list[str]:
    return [f"{name.rpartition('.')[2]}={value}" for value in values]


def _item_label(item: Item, texts: dict[Item, str]) -> str:
    return f"{item[0]}: {texts[item]} (seed {item[1]})"


def _pictures(job: SweptJob) -> dict[Item, Path]:
    """Finished pictures of a job."""
    found: dict[Item, Path] = {}
    try:
        with open(job.directory / "records.jsonl", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                path = job.directory / record["item"] / "image.png"
                if record["status"] == "ok" and path.is_file():
                    found[record["index"], record["seed"]] = path
    except (OSError, ValueError, KeyError, TypeError):
        log.debug("records of job %s cannot be read to their end", job.number, exc_info=True)
    return found


def _prompt_of(picture: Path) -> str:
    try:
        return str(json.loads((picture.parent / "record.json").read_bytes())["prompt"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def draw(page: Page, tile: int) -> Image.Image:
    """The page as one picture; no tile is larger than ``tile`` pixels, and fewer fit when there are very many."""
    rows = page.rows[: max(1, MAX_TILES // max(1, len(page.columns)))]
    columns = page.columns[:MAX_TILES]
    side_x, side_y = _tile_size(page, tile)
    width = ROW_LABEL_WIDTH + len(columns) * (side_x + GAP) + GAP
    height = 2 * LABEL_HEIGHT + len(rows) * (side_y + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, (GAP, GAP), page.title, width - 2 * GAP)
    for n, text in enumerate(columns):
        _write(pen, (ROW_LABEL_WIDTH + n * (side_x + GAP), LABEL_HEIGHT + GAP), text, side_x)
    for n, text in enumerate(rows):
        top = 2 * LABEL_HEIGHT + n * (side_y + GAP)
        for line, part in enumerate(_wrapped(text, ROW_LABEL_WIDTH - 2 * GAP, max(1, side_y // LABEL_HEIGHT))):
            _write(pen, (GAP, top + line * LABEL_HEIGHT), part, ROW_LABEL_WIDTH - 2 * GAP)
    for (row, column), path in page.pictures.items():
        if row < len(rows) and column < len(columns):
            with Image.open(path) as picture:
                picture.thumbnail((side_x, side_y), Image.Resampling.LANCZOS)
                place = (ROW_LABEL_WIDTH + column * (side_x + GAP), 2 * LABEL_HEIGHT + row * (side_y + GAP))
                sheet.paste(picture.convert("RGB"), place)
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


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """One line, cut to ``width`` pixels."""
    clean, font = _drawable(text)
    while clean and pen.textlength(clean, font) > width:
        clean = clean[: max(0, min(len(clean) - 1, int(len(clean) * width / pen.textlength(clean, font))))]
    pen.text(place, clean, "black", font)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """Pieces of at most ``width`` pixels, the last one cut."""
    clean, font = _drawable(text)
    pieces: list[str] = []
    while clean and len(pieces) < lines:
        end = len(clean)
        while end > 1 and font.getlength(clean[:end]) > width:
            end = max(1, min(end - 1, int(end * width / font.getlength(clean[:end]))))
        space = clean.rfind(" ", 0, end + 1)
        if end < len(clean) and space > end // 2:
            end = space
        pieces.append(clean[:end].strip())
        clean = clean[end:].lstrip()
    return pieces


def _drawable(text: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
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
