"""The grid picture of a multirun: columns and rows are two swept fields, prompts and seeds are pages.

With one swept field the rows are the prompts and seeds. Further fields become pages too.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from zimage_runner.collect.overrides import inert
from zimage_runner.collect.pictures import Picture, pictures_of
from zimage_runner.collect.sheet import Page, clean, draw, drawable
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.plan import slug

log = logging.getLogger(__name__)

MAX_PAGES = 50
MAX_ROWS = 100

Item = tuple[int, int]
"""Prompt number and seed."""


class JobResult(Protocol):
    """What a grid wants to know of a job of a multirun; ``cli/sweep/report.py`` reads it."""

    number: int
    directory: Path
    overrides: dict[str, str]


def write_grids(root: Path, jobs: Sequence[JobResult], fields: Sequence[str], *, tile: int) -> list[Path]:
    """Draw every page: grid.png when there is one, else grid/*.png. Returns the files."""
    pages = [page for page in layout(jobs, fields) if page.pictures]
    if len(pages) > MAX_PAGES:
        log.warning("the grid has %d pages, the first %d are drawn", len(pages), MAX_PAGES)
    written = []
    hidden = [entry for page in pages[:MAX_PAGES] for entry in number_hidden_labels(page)]
    if hidden:
        path = root / "grid_labels.csv"
        with atomic.directory(root) as folder:
            atomic.write_file(folder, path.name, _labels_table(hidden).encode())
        log.warning(
            "no font here shows every letter of the grid's labels: %s says what each label means; install one that "
            "does (Noto Sans CJK, WenQuanYi ...) and resume the multirun to have the grid drawn again",
            path,
        )
    for page in pages[:MAX_PAGES]:
        name, png = "grid.png" if len(pages) == 1 else f"grid/{page.name}.png", io.BytesIO()
        draw(page, tile).save(png, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
        with atomic.directory(root) as folder:
            if len(pages) > 1:
                beneath.make_dirs(folder, "grid")
            atomic.write_file(folder, name, png.getvalue())
        written.append(root / name)
    return written


def number_hidden_labels(page: Page) -> list[tuple[str, str, str]]:
    """Number the rows and columns of which no font shows every letter. Returns (page, label as drawn, text) of each."""
    font, found = page.font, []
    if drawable(page.title, font) != clean(page.title):
        found.append((page.name, drawable(page.title, font), page.title))
    for kind, labels in (("row", page.rows), ("column", page.columns)):
        for n, text in enumerate(labels):
            if drawable(text, font) != clean(text):
                labels[n] = f"{kind} {n + 1}: {drawable(text, font)}"
                found.append((page.name, labels[n], text))
    return found


def _labels_table(entries: Iterable[tuple[str, str, str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["page", "label", "text"])
    writer.writerows([inert(cell) for cell in entry] for entry in entries)
    return out.getvalue()


def layout(jobs: Sequence[JobResult], fields: Sequence[str]) -> list[Page]:
    """Which picture goes where."""
    items = {job.number: _pictures(job) for job in jobs}
    texts = _texts(items.values())
    by_field = [f for f in fields if f != "seeds"] or list(fields)  # seeds tell items apart, as swept prompts do not
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
                    page.pictures.setdefault((row, column), items[job.number][item].image)
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
        pages[key].pictures.setdefault(place, items[job.number][item].image)
    return list(pages.values())


def _values(jobs: Iterable[JobResult], name: str) -> list[str]:
    return list(dict.fromkeys(job.overrides.get(name, "") for job in jobs))


def _labels(name: str, values: Iterable[str]) -> list[str]:
    if name == "prompt":
        return list(values)
    return [f"{name.rpartition('.')[2]}={value}" for value in values]


def _item_label(item: Item, texts: dict[Item, str]) -> str:
    return f"{item[0]}: {texts[item]} (seed {item[1]})" if texts[item] else f"{item[0]}: seed {item[1]}"


def _texts(pictures: Iterable[dict[Item, Picture]]) -> dict[Item, str]:
    """Prompt of each item; empty where the jobs differ in it, as when prompts are swept."""
    found: dict[Item, set[str]] = {}
    for job in pictures:
        for item, picture in job.items():
            found.setdefault(item, set()).add(_prompt_of(picture))
    return {item: next(iter(texts)) if len(texts) == 1 else "" for item, texts in found.items()}


def _pictures(job: JobResult) -> dict[Item, Picture]:
    """Finished pictures of a job."""
    try:
        return {(p.index, p.seed): p for p in pictures_of([job.directory])}
    except FileNotFoundError:  # it was refused, or not begun: that is told elsewhere
        return {}
    except (OSError, UserError) as error:
        log.warning("job %s has no pictures in the grid: %s", job.number, error)
        return {}


def _prompt_of(picture: Picture) -> str:
    try:
        return str(picture.record()["prompt"])
    except (UserError, KeyError):
        return ""
