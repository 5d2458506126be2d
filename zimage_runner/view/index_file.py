"""The index's file: its tables, where it is kept, and that one process alone writes it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import tempfile
from pathlib import Path

VERSION = 3
SCHEMA = f"""
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE, sweep TEXT, number INTEGER, ledger TEXT NOT NULL DEFAULT '',
    position INTEGER NOT NULL DEFAULT 0, planned INTEGER, named INTEGER NOT NULL DEFAULT 0,
    stars TEXT NOT NULL DEFAULT '', base TEXT, overrides TEXT NOT NULL DEFAULT '{{}}'
);
CREATE TABLE params (id INTEGER PRIMARY KEY, json TEXT UNIQUE);
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY, text TEXT NOT NULL, folded TEXT, name TEXT, params INTEGER
);
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL, seed INTEGER NOT NULL, item TEXT NOT NULL,
    status INTEGER NOT NULL, image TEXT, bytes INTEGER, seconds REAL, written INTEGER, error TEXT,
    shard TEXT, offset INTEGER, record_offset INTEGER, record_bytes INTEGER,
    star INTEGER NOT NULL DEFAULT 0, UNIQUE (prompt, seed)
);
PRAGMA user_version = {VERSION};
"""


def index_path(cache: Path, root: str) -> Path:
    """Where the index of a folder is kept."""
    return cache / "view" / f"{hashlib.sha256(root.encode()).hexdigest()[:24]}.sqlite"


def reserve(path: Path) -> tuple[int, Path, tempfile.TemporaryDirectory[str] | None]:
    """A lock that nobody else has, and the file that goes with it: a temporary one where ``path`` is taken."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return elsewhere()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another gallery of the same folder
        os.close(lock)
        return elsewhere()
    return lock, path, None


def elsewhere() -> tuple[int, Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="zimage_view_")
    return os.open(os.devnull, os.O_RDONLY), Path(folder.name) / "index.sqlite", folder


def connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    db.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=WAL; PRAGMA cache_size=-16000;")
    return db


def open_index(path: Path) -> sqlite3.Connection:
    """The index; begun anew where it is of another version or damaged."""
    try:
        db = connect(path)
        if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            db.execute("SELECT count(*) FROM runs").fetchone()
            return db
        db.close()
    except sqlite3.DatabaseError:
        pass
    return new_index(path)


def new_index(path: Path) -> sqlite3.Connection:
    """An empty index in the place of whatever is there."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    db = connect(path)
    db.executescript(SCHEMA)
    return db
