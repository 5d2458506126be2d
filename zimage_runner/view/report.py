"""report.html: a finished run or multirun on one page that can be mailed. Thumbnails and plots are part of it."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from sqlite3 import Connection

from zimage_runner.errors import error_text
from zimage_runner.outputs import atomic, thumbnails
from zimage_runner.view.axes import PROMPT, SEED, lay_out
from zimage_runner.view.folder import Folder
from zimage_runner.view.index import Index
from zimage_runner.view.query import facets
from zimage_runner.view.report_page import Content, Picture, page, table
from zimage_runner.view.rows import FAILED, OK
from zimage_runner.view.runs import SWEEP, find_runs, jobs_in_all
from zimage_runner.view.state import RunState, describe_sweep
from zimage_runner.view.stored import COLUMNS, Stored
from zimage_runner.view.thumbs import LARGEST_PICTURE, shrunk

log = logging.getLogger(__name__)

REPORT = "report.html"
MOST_PICTURES = 2000
"""Thumbnails on one page; the first of each run."""
MOST_FAILURES = 200
NOT_SET = "not set"
MOST_TABLES = 12
"""Tables of a multirun's grid."""
SECONDS_EACH = 0.01
"""Time that the end of a run may spend on each thumbnail; at least LEAST_SECONDS in all."""
LEAST_SECONDS = 0.5
SAMPLED_RECORDS = 150
"""Records that are read for the plot of memory."""


def leave_report(directory: Path, stop: Callable[[], bool] = lambda: False) -> bool:
    """Write the report at the end of a run or multirun: in little time, and never an error of the run.

    stop: asked before each thumbnail; once it is true the remaining ones are left out.

    Whatever goes wrong is one warning, and False is returned.
    """
    try:
        write_report(directory, SECONDS_EACH, stop)
    except Exception as error:
        log.warning("%s was not written: %s", directory / REPORT, error_text(error))
        return False
    return True


def write_report(
    directory: str | os.PathLike[str], seconds_each: float | None = None, stop: Callable[[], bool] = lambda: False
) -> Path:
    """Write report.html into a run directory or a multirun's; the file is returned. Raises OSError.

    seconds_each: time for each thumbnail on average; those that would take longer are links alone. None: no limit.
    stop: see ``leave_report``.
    """
    root = Path(directory).absolute()
    with Folder(root) as folder:
        index = Index(folder, None)
        try:
            content = _content(root, folder, index)
            _draw(root, folder, content, seconds_each, stop)
            content.tables = _tables(index, content)
        finally:
            index.close()
    with atomic.directory(root) as place:
        atomic.write_file(place, REPORT, page(content).encode())
    return root / REPORT


def _content(root: Path, folder: Folder, index: Index) -> Content:
    states = []
    for found in find_runs(str(root)):
        number = index.add(found)
        state = RunState(number=number, found=found)
        for times in index.grow(number):
            state.times.extend(times)
        state.look(folder)
        state.owner = None  # the run's own process writes this, at its end
        states.append(state)
    with index.reading() as db:
        for state in states:
            state.count(db, latest=0)
        content = Content(title=_title(root), runs=[state.describe() for state in states])
        if (root / SWEEP).is_file() and content.runs:
            content.sweep = describe_sweep("", content.runs, jobs_in_all(folder, ""))
        rows = db.execute(
            f"SELECT p.id, r.path, p.item, p.seed, t.text, p.prompt, p.written, p.seconds, {COLUMNS} FROM pictures p "
            "JOIN runs r ON r.id = p.prompt >> 32 LEFT JOIN prompts t ON t.id = p.prompt "
            f"WHERE p.status={OK} ORDER BY p.prompt, p.seed LIMIT ?",
            (MOST_PICTURES,),
        )
        for number, path, item, seed, text, where, written, seconds, *place in rows:
            content.pictures.append(
                Picture(
                    number=number,
                    stored=Stored.of_row(path, item, place),
                    seed=seed,
                    prompt=text or "",
                    where=where,
                    written=written,
                    seconds=seconds,
                )
            )
        content.more = max(0, sum(run["done"] for run in content.runs) - len(content.pictures))
        content.failures = db.execute(
            "SELECT t.text, p.seed, p.error, p.written FROM pictures p LEFT JOIN prompts t ON t.id = p.prompt "
            f"WHERE p.status={FAILED} ORDER BY p.id LIMIT ?",
            (MOST_FAILURES,),
        ).fetchall()
        content.settings = _settings(db, content)
        content.memory = _memory(folder, content.pictures)
    return content


def _title(root: Path) -> str:
    name = root.name
    return f"{root.parent.name}, {name[:10]} {name[11:16].replace('-', ':')}" if name[:2] == "20" else name


def _draw(root: Path, folder: Folder, content: Content, seconds_each: float | None, stop: Callable[[], bool]) -> None:
    """Thumbnails: those that this process has from drawing, the others from the files while there is time."""
    pictures = content.pictures
    seconds = None if seconds_each is None else max(LEAST_SECONDS, seconds_each * len(pictures))
    end = None if seconds is None else time.monotonic() + seconds
    for picture in pictures:
        data = thumbnails.kept(root / picture.stored.name)
        if data is None:
            if picture.stored.place is None:
                picture.missing = folder.stat(picture.stored.name) is None
            if picture.missing or (end is not None and time.monotonic() > end) or stop():
                continue
            try:
                data = thumbnails.small_jpeg(shrunk(picture.stored.read(folder, LARGEST_PICTURE), thumbnails.SIDE))
            except OSError:
                picture.missing = True
                continue
        picture.thumbnail = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _memory(folder: Folder, pictures: Sequence[Picture]) -> list[tuple[int, float]]:
    """GPU memory over time, from some of the records; empty for runs without a GPU."""
    found = []
    step = -(-len(pictures) // SAMPLED_RECORDS) or 1
    for picture in sorted((p for p in pictures if p.written is not None), key=lambda p: p.written or 0)[::step]:
        memory = picture.stored.record(folder).get("gpu_memory")
        value = memory.get("peak_reserved_gb") if isinstance(memory, dict) else None
        if not isinstance(value, int | float):
            return []
        found.append((picture.written or 0, float(value)))
    return found


def _settings(db: Connection, content: Content) -> list[tuple[str, str]]:
    """What was drawn with what: one value, or how many there are and which."""
    found: dict[str, list[str]] = {}
    for (text,) in db.execute("SELECT json FROM params WHERE id IN (SELECT params FROM prompts)"):
        for name, value in json.loads(text).items():
            values = found.setdefault(name, [])
            shown = NOT_SET if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            if shown not in values:
                values.append(shown)
    sizes = facets(db, None)["sizes"]
    found = {"size": [size.replace("x", " x ") for size in sizes], **found}
    for name in ("width", "height"):
        found.pop(name, None)
    prompts, seeds = db.execute(  # jobs of a multirun have their prompts in common
        "SELECT count(DISTINCT coalesce(t.text, p.prompt)), count(DISTINCT p.seed) FROM pictures p "
        "LEFT JOIN prompts t ON t.id = p.prompt"
    ).fetchone()
    rows = [("prompts", f"{prompts:,}"), ("seeds", f"{seeds:,}")]
    said = {name: values for name, values in found.items() if any(values) and values != [NOT_SET]}
    return rows + [(name.replace("_", " "), ", ".join(values[:12])) for name, values in said.items()]


def _tables(index: Index, content: Content) -> list[str]:
    """The grid of a multirun: two fields as columns and rows, a table for each prompt or seed."""
    if content.sweep is None:
        return []
    with index.reading() as db:
        swept = list(facets(db, None)["parameters"])
        if not swept:
            return []
        columns, rows = (swept[0], swept[1]) if len(swept) > 1 else (swept[0], PROMPT)
        pages = PROMPT if rows != PROMPT else SEED
        by_number = {picture.number: picture for picture in content.pictures}
        tables: list[str] = []
        for number in range(MOST_TABLES):
            axes = lay_out(db, list(by_number), columns, rows, pages, number)
            if number >= max(1, len(axes.pages)):
                break
            tables.append(table(axes.pages[number] if axes.pages else "", axes, by_number))
    return tables
