"""The gallery's web application: the page's files, what it asks for as JSON, pictures, and events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from zimage_runner.errors import UserError
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.ledger import IMAGE, RECORD
from zimage_runner.outputs.stars import mark
from zimage_runner.view.axes import as_picture, lay_out
from zimage_runner.view.command import command_for
from zimage_runner.view.folder import Folder
from zimage_runner.view.index import OK, Index, index_path
from zimage_runner.view.query import Question, Views, facets, in_runs, rows_of
from zimage_runner.view.runs import below, read_json
from zimage_runner.view.safety import Safety
from zimage_runner.view.thumbs import LARGEST_PICTURE, SIZES, Thumbnails
from zimage_runner.view.watch import Watcher, runs_of

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
PICTURE_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}
MOST_ROWS = 500
NEIGHBOURS = 60
HEARTBEAT_SECONDS = 15.0
MOST_MARKED = 10_000
MOST_TILES = 2500
FOREVER = "private, max-age=31536000, immutable"
"""For addresses that name a picture's version."""


class Gallery:
    """All that the server holds: the folder, its index, the thread that follows the runs, thumbnails."""

    def __init__(self, root: str, cache: Path, cache_bytes: int) -> None:
        self.root = os.path.realpath(root)
        self.folder = Folder(self.root)
        self.index = Index(self.folder, index_path(cache, self.root))
        self.thumbnails = Thumbnails(self.folder, cache, cache_bytes)
        self.watcher = Watcher(self.root, self.folder, self.index)
        self.views = Views(self.index)
        self.facets: dict[str, tuple[int, dict[str, Any]]] = {}

    def question(self, scope: str, q: str, status: str, star: str, sort: str) -> Question:
        runs = runs_of(self.watcher.states(), scope)
        return Question(runs=runs, text=q[:2000], status=status, star=star, sort=sort)

    def picture(self, number: int) -> tuple[str, str, str, int]:
        """Run path, item directory, image file and status of a picture. Raises HTTPException."""
        with self.index.reading() as db:
            row = db.execute(
                "SELECT r.path, p.item, p.image, p.status FROM pictures p JOIN runs r ON r.id = p.prompt >> 32 "
                "WHERE p.id=?",
                (number,),
            ).fetchone()
        if row is None:
            raise HTTPException(404, "there is no such picture")
        path, item, image, status = row
        return path, item, image or IMAGE, status

    def close(self) -> None:
        if self.watcher.is_alive():
            self.watcher.stop()
        self.index.close()
        self.folder.close()


def application(gallery: Gallery, *, local: bool = True, token: str | None = None) -> Safety:
    """The ASGI application. ``local``: only this machine's names are taken for Host."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not gallery.watcher.is_alive():
            gallery.watcher.start()
        yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_page(app)
    _add_lists(app, gallery)
    _add_pictures(app, gallery)
    _add_grid(app, gallery)

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    return Safety(app, local=local, token=token)


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix[1:] in TYPES}

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(files["index.html"], media_type="text/html", headers={"cache-control": "no-cache"})

    @app.get("/page/{name}")
    async def file(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        kind = TYPES[files[name].suffix[1:]]
        return FileResponse(files[name], media_type=kind, headers={"cache-control": "no-cache"})


def _add_lists(app: FastAPI, gallery: Gallery) -> None:
    watcher = gallery.watcher

    @app.get("/api/runs")
    def runs() -> dict[str, Any]:
        return watcher.overview()

    @app.get("/api/events")
    async def events(request: Request) -> StreamingResponse:
        return StreamingResponse(_events(watcher, request), media_type="text/event-stream", headers=NO_STORE)

    @app.get("/api/pictures")
    def pictures(
        scope: str = "all", q: str = "", status: str = "", star: str = "", sort: str = "newest",
        offset: int = 0, limit: int = 100, version: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        start = time.perf_counter()
        answer = gallery.views(gallery.question(scope, q, status, star, sort), watcher.version, version)
        offset, limit = max(0, offset), max(0, min(limit, MOST_ROWS))
        with gallery.index.reading() as db:
            rows = rows_of(db, answer.ids[offset : offset + limit])
        took = time.perf_counter() - start
        return {"total": len(answer.ids), "offset": offset, "pictures": rows, "version": answer.version, "took": took}

    @app.get("/api/position/{number}")
    def position(
        number: int, scope: str = "all", q: str = "", status: str = "", star: str = "", sort: str = "newest"
    ) -> dict[str, Any]:
        answer = gallery.views(gallery.question(scope, q, status, star, sort), watcher.version)
        place = answer.ids.index(number) if number in answer.ids else None
        return {"position": place, "total": len(answer.ids)}

    @app.get("/api/facets")
    def get_facets(scope: str = "all") -> dict[str, Any]:
        version = watcher.version
        known = gallery.facets.get(scope)
        if known is None or known[0] != version:
            with gallery.index.reading() as db:
                known = version, facets(db, runs_of(watcher.states(), scope))
            if len(gallery.facets) > 100:
                gallery.facets.clear()
            gallery.facets[scope] = known
        return known[1]


NO_STORE = {"cache-control": "no-store"}


async def _events(watcher: Watcher, request: Request) -> AsyncIterator[str]:
    """Server-sent events: first how everything stands, then what changes. A slow reader gets the newest of each run."""
    loop, waiting, arrived = asyncio.get_running_loop(), {}, asyncio.Event()

    def take(event: dict[str, Any]) -> None:
        key = (event["type"], event["run"]["id"] if event["type"] == "run" else event["run"])
        waiting[key] = event
        arrived.set()

    def listener(event: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(take, event)

    end = watcher.listen(listener)
    try:
        overview = await asyncio.to_thread(watcher.overview)
        yield f"data: {json.dumps({'type': 'all', **overview})}\n\n"
        while not await request.is_disconnected():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), HEARTBEAT_SECONDS)
            arrived.clear()
            events = list(waiting.values())
            waiting.clear()
            yield "".join(f"data: {json.dumps(event)}\n\n" for event in events) or ": still here\n\n"
    finally:
        end()


def _add_pictures(app: FastAPI, gallery: Gallery) -> None:
    @app.get("/picture/{number}")
    def picture(number: int) -> Response:
        path, item, image, _ = gallery.picture(number)
        data = _read(gallery, below(path, f"{item}/{image}"))
        name = f"{item.split('/')[-2]}_{item.split('/')[-1]}.{image.rpartition('.')[2]}"
        headers = {"cache-control": FOREVER, "content-disposition": f"inline; filename*=UTF-8''{_percent(name)}"}
        return Response(data, media_type=PICTURE_TYPES[image.rpartition(".")[2]], headers=headers)

    @app.get("/thumb/{number}")
    def thumb(number: int, s: int = 320, v: str = "") -> Response:
        if s not in SIZES:
            raise HTTPException(400, f"s={s}: choose {', '.join(map(str, SIZES))}")
        path, item, image, _ = gallery.picture(number)
        try:
            data = gallery.thumbnails.get(below(path, f"{item}/{image}"), v, s)
        except OSError as error:
            raise HTTPException(404, _why(error)) from None
        return Response(data, media_type="image/webp", headers={"cache-control": FOREVER})

    @app.get("/api/picture/{number}")
    def details(number: int) -> dict[str, Any]:
        path, item, image, status = gallery.picture(number)
        record = read_json(gallery.folder, below(path, f"{item}/{RECORD}"))
        file = os.path.join(gallery.root, path, item, image)
        with gallery.index.reading() as db:
            rows = rows_of(db, [number])
            full = db.execute(
                "SELECT t.text, t.name, p.error, p.bytes FROM pictures p LEFT JOIN prompts t ON t.id=p.prompt "
                "WHERE p.id=?",
                (number,),
            ).fetchone()
            neighbours = _neighbours(db, number)
        found = gallery.folder.stat(below(path, f"{item}/{image}"))
        missing = "" if found or status != OK else "the file is missing: resume the run to draw it again"
        if found and status == OK and full[3] and found.st_size != full[3]:
            missing = f"the file has {found.st_size:,} bytes instead of {full[3]:,}: resume the run to draw it again"
        return {
            **rows[0],
            "prompt": full[0] or "",
            "name": full[1],
            "error": full[2],
            "damage": missing,
            "bytes": full[3],
            "path": file,
            "file": f"{item}/{image}",
            "run_path": path,
            "record": record,
            "command": command_for(record),
            "reproduce": _reproduce(file) if status == OK else None,
            "neighbours": neighbours,
        }

    @app.post("/api/star")
    def star(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        numbers, value = body.get("pictures"), body.get("star")
        if value not in (-1, 0, 1) or not isinstance(numbers, list) or not 0 < len(numbers) <= MOST_MARKED:
            raise HTTPException(400, 'write {"pictures": [number, ...], "star": -1, 0 or 1}')
        by_run: dict[str, dict[str, int]] = {}
        for number in numbers:
            if type(number) is not int or abs(number) >= 1 << 62:
                raise HTTPException(400, "pictures are whole numbers")
            path, item, _, _ = gallery.picture(number)
            by_run.setdefault(path, {})[item] = value
        for path, items in by_run.items():
            _mark(gallery, path, items)
        return {"star": value, "pictures": numbers}


def _mark(gallery: Gallery, path: str, items: dict[str, int]) -> None:
    try:
        fd = gallery.folder.open_directory(path)
    except OSError as error:
        raise HTTPException(404, f"{path}: {error.strerror}") from None
    try:
        mark(fd, items, path)
    except OSError as error:
        raise HTTPException(409, f"stars cannot be written to {path}: {error.strerror}") from None
    finally:
        os.close(fd)
    state = next((state for state in gallery.watcher.states() if state.found.path == path), None)
    if state is not None:
        gallery.watcher.refresh(state.number)


def _neighbours(db: Any, number: int) -> dict[str, list[dict[str, Any]]]:
    """Pictures of the same prompt with other seeds, of the same seed with other prompts, and of other jobs."""
    prompt, seed, text, sweep = db.execute(
        "SELECT p.prompt, p.seed, t.text, r.sweep FROM pictures p LEFT JOIN prompts t ON t.id=p.prompt "
        "JOIN runs r ON r.id = p.prompt >> 32 WHERE p.id=?",
        (number,),
    ).fetchone()
    clause, values = in_runs([prompt >> 32])
    found = {
        "seeds": db.execute(
            "SELECT id FROM pictures WHERE prompt=? AND id<>? AND status=? ORDER BY abs(seed - ?), seed LIMIT ?",
            (prompt, number, OK, seed, NEIGHBOURS),
        ),
        "prompts": db.execute(
            f"SELECT p.id FROM pictures p WHERE {clause} AND p.seed=? AND p.id<>? AND p.status=? "
            "ORDER BY abs(p.prompt - ?) LIMIT ?",
            (*values, seed, number, OK, prompt, NEIGHBOURS),
        ),
        "jobs": [],
    }
    if sweep is not None and text is not None:
        jobs = [row[0] for row in db.execute("SELECT id FROM runs WHERE sweep=? AND id<>?", (sweep, prompt >> 32))]
        clause, values = in_runs(jobs)
        found["jobs"] = db.execute(
            f"SELECT p.id FROM pictures p JOIN prompts t ON t.id=p.prompt WHERE {clause} AND p.seed=? AND t.text=? "
            "AND p.status=? ORDER BY p.prompt LIMIT ?",
            (*values, seed, text, OK, NEIGHBOURS),
        )
    return {name: rows_of(db, [row[0] for row in rows]) for name, rows in found.items()}


def _add_grid(app: FastAPI, gallery: Gallery) -> None:
    def page_of(scope: str, q: str, status: str, star: str, columns: str, rows: str, pages: str, page: int) -> Any:
        answer = gallery.views(gallery.question(scope, q, status, star, "prompt"), gallery.watcher.version)
        with gallery.index.reading() as db:
            return lay_out(db, answer.ids, columns, rows, pages, page)

    @app.get("/api/grid")
    def grid(
        columns: str, rows: str, pages: str = "", page: int = 0, scope: str = "all", q: str = "", status: str = "",
        star: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        axes = page_of(scope, q, status, star, columns, rows, pages, page)
        with gallery.index.reading() as db:
            found = {row["id"]: row for row in rows_of(db, list(axes.cells.values()))}
        cells = [{"row": r, "column": c, **found[n]} for (r, c), n in axes.cells.items() if n in found]
        return {
            "columns": axes.columns, "rows": axes.rows, "pages": axes.pages, "page": axes.page, "cells": cells,
            "cut": axes.cut,
        }  # fmt: skip

    @app.get("/api/grid.png")
    def grid_picture(
        columns: str, rows: str, pages: str = "", page: int = 0, scope: str = "all", q: str = "", status: str = "",
        star: str = "", tile: int = 256,
    ) -> Response:  # fmt: skip
        axes = page_of(scope, q, status, star, columns, rows, pages, page)
        if len(axes.rows) * len(axes.columns) > MOST_TILES:
            raise UserError(f"the grid has more than {MOST_TILES:,} places: filter it first")
        files = {}
        for place, number in axes.cells.items():
            path, item, image, _ = gallery.picture(number)
            file = Inside(Path(gallery.root), below(path, f"{item}/{image}"))
            if file.is_file():  # one that is gone leaves its place empty
                files[place] = file
        if not files:
            raise UserError("no picture is left to draw a grid of")
        title = axes.pages[axes.page] if axes.pages else scope
        try:
            data = as_picture(axes, files, title, max(32, min(tile, 1024)))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"a picture of the grid cannot be read: {error}") from None
        return Response(
            data, media_type="image/png", headers={"content-disposition": 'attachment; filename="grid.png"'}
        )


def _read(gallery: Gallery, name: str) -> bytes:
    try:
        return gallery.folder.read(name, LARGEST_PICTURE)
    except OSError as error:
        raise HTTPException(404, _why(error)) from None


def _why(error: OSError) -> str:
    return f"the picture cannot be read: {error.strerror or error}"


def _reproduce(file: str) -> str:
    import shlex

    return shlex.join(["python", "-m", "zimage_runner.reproduce", file])


def _percent(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
