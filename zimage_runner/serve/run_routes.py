"""Runs over HTTP: asked for, followed, stopped, and their pictures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from zimage_runner.outputs.ledger import Entry
from zimage_runner.outputs.place import picture_at
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.fields import RunRequest, parse
from zimage_runner.serve.guard import read_json
from zimage_runner.serve.run_files import OPEN, RUNNING, ServedRun
from zimage_runner.serve.service import Service

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
MOST_LISTENERS = 100
MOST_LISTED = 1000
NO_STORE = {"cache-control": "no-store"}


def describe(service: Service, run: ServedRun) -> dict[str, Any]:
    """A run as JSON: what its ledger says, and how long it may still take."""
    ok, failed = service.runs.settled(run)
    drawn, left = ok - run.settled_before, max(0, run.planned - ok - failed)
    each = None
    if run.state == RUNNING and run.started is not None and drawn > 0:
        each = (time.time() - run.started) / drawn
    return {
        "id": run.id,
        "object": "run",
        "state": run.state,
        "created": int(run.created),
        "directory": run.directory,
        "counts": {"planned": run.planned, "ok": ok, "failed": failed, "remaining": left},
        "seconds_per_picture": each,
        "eta_seconds": None if each is None else each * left,
        "error": run.error,
        "pictures": f"/v1/runs/{run.id}/pictures",
    }


def add_runs(app: FastAPI, service: Service) -> None:
    """Add the routes below /v1/runs."""
    listeners: set[object] = set()

    @app.post("/v1/runs")
    async def begin(request: Request) -> JSONResponse:
        asked = parse(RunRequest, await read_json(request, service.settings.server))
        if (why := service.why_not_ready) is not None:
            raise ApiError(503, why, code="not_ready", retry_after_s=5)
        run = await asyncio.to_thread(service.runs.accept, asked)
        return JSONResponse(describe(service, run), 202, headers={**NO_STORE, "location": f"/v1/runs/{run.id}"})

    @app.get("/v1/runs")
    def listed() -> dict[str, Any]:
        runs = service.runs.all()[:MOST_LISTED]
        return {"object": "list", "data": [{"id": r.id, "object": "run", "state": r.state} for r in runs]}

    @app.get("/v1/runs/{id}")
    def one(id: str) -> dict[str, Any]:
        return describe(service, service.runs.get(id))

    @app.delete("/v1/runs/{id}")
    def stop(id: str) -> dict[str, Any]:
        run = service.runs.get(id)
        service.runs.stop(run)
        return describe(service, run)

    @app.get("/v1/runs/{id}/events")
    async def events(id: str, request: Request) -> StreamingResponse:
        run = service.runs.get(id)
        if len(listeners) >= MOST_LISTENERS:
            raise ApiError(429, "too many listen already", code="queue_full", retry_after_s=10)
        stream = _events(service, run, request, listeners)
        return StreamingResponse(stream, media_type="text/event-stream", headers=NO_STORE)

    @app.get("/v1/runs/{id}/pictures")
    def pictures(id: str, offset: int = 0, limit: int = 100) -> dict[str, Any]:
        run = service.runs.get(id)
        first = max(0, offset)
        total, entries = service.runs.items.items(service.runs.path(run), first, max(0, min(limit, MOST_LISTED)))
        data = [
            {
                "item": item,
                "status": "ok" if entry.ok else "failed",
                "sha256": entry.sha256 or None,
                "url": f"/v1/runs/{run.id}/pictures/{number}" if entry.ok else None,
            }
            for number, (item, entry) in enumerate(entries, first)
        ]
        return {"object": "list", "total": total, "data": data}

    @app.get("/v1/runs/{id}/pictures/{number}")
    def picture(id: str, number: str) -> Response:
        run = service.runs.get(id)
        entries: list[tuple[str, Entry]] = []
        if number.isascii() and number.isdigit() and len(number) < 10:
            entries = service.runs.items.items(service.runs.path(run), int(number))[1]
        if not entries or not entries[0][1].ok:
            raise ApiError(404, f"there is no picture {number!r:.40} of this run", code="not_found")
        item, entry = entries[0]
        try:
            data = picture_at(service.runs.path(run), item, entry.image, entry.size, entry.place).read_bytes()
        except (OSError, ValueError):
            raise ApiError(404, "the picture's file is gone", code="not_found") from None
        kind = MEDIA_TYPES.get(entry.image.rpartition(".")[2], "application/octet-stream")
        return Response(data, media_type=kind, headers={"cache-control": "private, no-cache"})


async def _events(service: Service, run: ServedRun, request: Request, listeners: set[object]) -> AsyncIterator[str]:
    """Server-sent events: how the run stands now, then each change, until it has ended."""
    me, before, quiet = object(), None, 0.0
    listeners.add(me)
    try:
        while not service.draining.is_set() and not await request.is_disconnected():
            now = await asyncio.to_thread(describe, service, run)
            what = (now["state"], now["counts"])
            if what != before:
                before, quiet = what, 0.0
                yield f"data: {json.dumps(now)}\n\n"
            if run.state not in OPEN and now["state"] not in OPEN:
                return
            if quiet >= HEARTBEAT_SECONDS:
                quiet = 0.0
                yield ": still here\n\n"
            await asyncio.sleep(POLL_SECONDS)
            quiet += POLL_SECONDS
    finally:
        listeners.discard(me)
