"""The gallery's addresses of one picture: its file, its thumbnail, what made it, its star."""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Response

from zimage_runner.outputs.stars import mark
from zimage_runner.view.command import command_for
from zimage_runner.view.gallery import Gallery
from zimage_runner.view.query import in_runs, rows_of
from zimage_runner.view.rows import OK
from zimage_runner.view.thumbs import LARGEST_PICTURE, SIZES

PICTURE_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}
NEIGHBOURS = 60
MOST_MARKED = 10_000
FOREVER = "private, max-age=31536000, immutable"
"""For addresses that name a picture's version."""


def add_pictures(app: FastAPI, gallery: Gallery) -> None:
    @app.get("/picture/{number}")
    def picture(number: int) -> Response:
        stored, _ = gallery.picture(number)
        item, image = stored.item, stored.image
        try:
            data = stored.read(gallery.folder, LARGEST_PICTURE)
        except OSError as error:
            raise HTTPException(404, _why(error)) from None
        name = f"{item.split('/')[-2]}_{item.split('/')[-1]}.{image.rpartition('.')[2]}"
        headers = {"cache-control": FOREVER, "content-disposition": f"inline; filename*=UTF-8''{_percent(name)}"}
        return Response(data, media_type=PICTURE_TYPES[image.rpartition(".")[2]], headers=headers)

    @app.get("/thumb/{number}")
    def thumb(number: int, s: int = 320, v: str = "") -> Response:
        if s not in SIZES:
            raise HTTPException(400, f"s={s}: choose {', '.join(map(str, SIZES))}")
        try:
            data = gallery.thumbnails.get(gallery.picture(number)[0], v, s)
        except OSError as error:
            raise HTTPException(404, _why(error)) from None
        return Response(data, media_type="image/webp", headers={"cache-control": FOREVER})

    @app.get("/api/picture/{number}")
    def details(number: int) -> dict[str, Any]:
        stored, status = gallery.picture(number)
        record = stored.record(gallery.folder)
        file = os.path.join(gallery.root, stored.name)
        with gallery.index.reading() as db:
            rows = rows_of(db, [number])
            full = db.execute(
                "SELECT t.text, t.name, p.error, p.bytes FROM pictures p LEFT JOIN prompts t ON t.id=p.prompt "
                "WHERE p.id=?",
                (number,),
            ).fetchone()
            neighbours = _neighbours(db, number)
        damage = stored.damage(gallery.folder) if status == OK else ""
        return {
            **rows[0],
            "prompt": full[0] or "",
            "name": full[1],
            "error": full[2],
            "damage": f"{damage}: resume the run to draw it again" if damage else "",
            "bytes": full[3],
            "path": file,
            "file": f"{stored.item}/{stored.image}",
            "shard": stored.place and stored.place.shard,
            "run_path": stored.run,
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
            stored, _ = gallery.picture(number)
            by_run.setdefault(stored.run, {})[stored.item] = value
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


def _why(error: OSError) -> str:
    return f"the picture cannot be read: {error.strerror or error}"


def _reproduce(file: str) -> str:
    import shlex

    return shlex.join(["python", "-m", "zimage_runner.reproduce", file])


def _percent(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
