"""What the gallery holds while it is open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from zimage_runner.view.folder import Folder
from zimage_runner.view.index import Index
from zimage_runner.view.index_file import index_path
from zimage_runner.view.query import MAX_SEED, Question, Views
from zimage_runner.view.stored import COLUMNS, Stored
from zimage_runner.view.thumbs import Thumbnails
from zimage_runner.view.watch import Watcher, runs_of


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

    def picture(self, number: int) -> tuple[Stored, int]:
        """Where a picture is, and its status. Raises HTTPException."""
        if abs(number) > MAX_SEED:  # SQLite counts no further
            raise HTTPException(404, "there is no such picture")
        with self.index.reading() as db:
            row = db.execute(
                f"SELECT r.path, p.item, p.status, {COLUMNS} FROM pictures p JOIN runs r ON r.id = p.prompt >> 32 "
                "WHERE p.id=?",
                (number,),
            ).fetchone()
        if row is None:
            raise HTTPException(404, "there is no such picture")
        return Stored.of_row(row[0], row[1], row[3:]), row[2]

    def close(self) -> None:
        if self.watcher.is_alive():
            self.watcher.stop()
        self.index.close()
        self.folder.close()
