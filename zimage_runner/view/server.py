"""The gallery's web application: the page's files, what it asks for as JSON, pictures, and events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from zimage_runner.errors import UserError
from zimage_runner.view.axes import as_picture, lay_out
from zimage_runner.view.gallery import Gallery
from zimage_runner.view.pictures import add_pictures
from zimage_runner.view.query import facets, rows_of
from zimage_runner.view.safety import Safety
from zimage_runner.view.watch import Watcher, runs_of

PAGE = Path(__file__).parent / "page"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
MOST_ROWS = 500
HEARTBEAT_SECONDS = 15.0
MOST_TILES = 2500


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
    add_pictures(app, gallery)
    _add_grid(app, gallery)

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(sqlite3.DatabaseError)
    async def build_again(request: Request, error: sqlite3.DatabaseError) -> JSONResponse:
        gallery.watcher.rebuild()
        return JSONResponse({"detail": f"the gallery's index is damaged ({error}) and is built again"}, 503)

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
        arrived.set()
        if event["type"] != "closing":
            waiting[event["type"], event["run"]["id"] if event["type"] == "run" else event["run"]] = event

    def listener(event: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(take, event)

    end = watcher.listen(listener)
    try:
        overview = await asyncio.to_thread(watcher.overview)
        yield f"data: {json.dumps({'type': 'all', **overview})}\n\n"
        while not watcher.closing and not await request.is_disconnected():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), HEARTBEAT_SECONDS)
            arrived.clear()
            events = list(waiting.values())
            waiting.clear()
            yield "".join(f"data: {json.dumps(event)}\n\n" for event in events) or ": still here\n\n"
    finally:
        end()


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
            file = gallery.picture(number)[0].file(gallery.folder)
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
