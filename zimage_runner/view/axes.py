"""The grid of a sweep: any two fields as columns and rows, a third as pages; on the page and as a picture."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zimage_runner.collect.sheet import Page, draw
from zimage_runner.errors import UserError
from zimage_runner.outputs.beneath import Inside
from zimage_runner.view.rows import OK

MOST = 200
"""Columns and rows of a page."""
PROMPT, SEED, RUN = "prompt", "seed", "run"


@dataclass(kw_only=True, slots=True)
class Axes:
    """A page: labels of columns and rows, and a picture's number for each place that has one."""

    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    page: int = 0
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    cut: bool = False
    """More than MOST columns or rows: those are left out."""


def lay_out(db: sqlite3.Connection, ids: Sequence[int], columns: str, rows: str, pages: str, page: int) -> Axes:
    """Place the finished pictures among ``ids``; of several for one place the first. Raises UserError."""
    if len({columns, rows, pages} - {""}) < len([name for name in (columns, rows, pages) if name]):
        raise UserError("columns, rows and pages must be three different fields")
    found = [(place, number) for number, place in _places(db, ids, (columns, rows, pages))]
    page_values = _sorted({place[2] for place, _ in found})
    page = max(0, min(page, len(page_values) - 1))
    shown = [(place, number) for place, number in found if page_values and place[2] == page_values[page]]
    column_values = _sorted({place[0] for place, _ in shown})
    row_values = _sorted({place[1] for place, _ in shown})
    column_of = {value: n for n, value in enumerate(column_values[:MOST])}
    row_of = {value: n for n, value in enumerate(row_values[:MOST])}
    axes = Axes(
        columns=[_label(columns, value) for value in column_of],
        rows=[_label(rows, value) for value in row_of],
        pages=[_label(pages, value) for value in page_values] if pages else [],
        page=page,
        cut=len(column_values) > MOST or len(row_values) > MOST,
    )
    for place, number in shown:
        if place[0] in column_of and place[1] in row_of:
            axes.cells.setdefault((row_of[place[1]], column_of[place[0]]), number)
    return axes


Value = tuple[int, float, str]
"""Numbers sort before texts."""


def _places(
    db: sqlite3.Connection, ids: Sequence[int], names: tuple[str, str, str]
) -> list[tuple[int, tuple[Value, Value, Value]]]:
    rows = db.execute(
        "SELECT p.id, p.prompt >> 32, p.prompt & 4294967295, p.seed, t.text, t.params FROM pictures p "
        "LEFT JOIN prompts t ON t.id=p.prompt WHERE p.status=? AND p.id IN (SELECT value FROM json_each(?))",
        (OK, json.dumps(list(ids))),
    )
    params = {number: json.loads(text) for number, text in db.execute("SELECT id, json FROM params")}
    runs = dict(db.execute("SELECT id, path FROM runs"))
    found = {}
    for number, run, index, seed, text, param in rows:
        values = {PROMPT: (0, index, text or ""), SEED: (0, seed, str(seed)), RUN: (0, run, runs.get(run, ""))}
        own = params.get(param, {})
        a, b, c = (values[n] if n in values else _value(own.get(n)) for n in names)
        found[number] = (a, b, c)
    return [(number, found[number]) for number in ids if number in found]


def _value(value: Any) -> Value:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), f"{value:g}" if isinstance(value, float) else str(value))
    return (1, 0.0, "" if value is None else str(value))


def _sorted(values: set[Value]) -> list[Value]:
    return sorted(values)


def _label(name: str, value: Value) -> str:
    text = value[2]
    if name in (PROMPT, RUN, ""):
        return text
    return f"{name.rpartition('.')[2].removeprefix('num_inference_').replace('_', ' ')} {text}"


def as_picture(axes: Axes, files: dict[tuple[int, int], Inside], title: str, tile: int) -> bytes:
    """PNG of a page with its labels. ``files`` are the pictures by place; OSError for one that cannot be read."""
    page = Page(title=title, name="grid", rows=list(axes.rows), columns=list(axes.columns), pictures=files)
    out = io.BytesIO()
    draw(page, tile).save(out, "PNG", compress_level=1)
    return out.getvalue()
