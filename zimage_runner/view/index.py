"""The index: every picture of every run in one SQLite file, built once and grown from what the ledgers gain.

The ledger remains the truth: the file may be deleted at any time. One thread writes, others read.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs.ledger import IMAGE, RECORD, RECORDS
from zimage_runner.outputs.stars import LARGEST, STARS, Stars, read_stars
from zimage_runner.view.folder import Folder
from zimage_runner.view.runs import PROMPTS, Found, below, read_json, read_settings

VERSION = 2
BLOCK = 4 << 20
"""Bytes of a ledger that are read and committed at once."""
FIRST_BLOCK = 256 << 10
"""The first ones, so that there is soon something to see."""
HEAD = 4096
"""Bytes of a ledger by which it is known again."""
OK, FAILED = 0, 1
PROMPTS_AT_ONCE = 2000
ALL_NAMED = -1
"""Instead of a position in prompts.jsonl: it was read to its end."""
_ITEM = re.compile(r"items/([0-9]{5,9})_[^/\\]+/seed_([0-9]{1,19})")
"""A ledger is a file that anybody may have written."""
_IMAGE = re.compile(r"[A-Za-z0-9_-]+\.(png|jpg|jpeg|webp)")
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
    star INTEGER NOT NULL DEFAULT 0, UNIQUE (prompt, seed)
);
PRAGMA user_version = {VERSION};
"""
_ADD = """
INSERT INTO pictures (prompt, seed, item, status, image, bytes, seconds, written, error)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (prompt, seed) DO UPDATE SET item=excluded.item, status=excluded.status, image=excluded.image,
    bytes=excluded.bytes, seconds=excluded.seconds, written=excluded.written, error=excluded.error
"""


class Index:
    """The pictures of the runs below ``folder``. ``grow`` and ``forget`` belong to one thread."""

    def __init__(self, folder: Folder, path: Path | None) -> None:
        """``path``: where the index is kept; None for one that goes with this object."""
        self._folder = folder
        self._lock_file, self.path, self._temporary = _reserve(path) if path else _elsewhere()
        self._readers = threading.local()
        self._writer = _open(self.path)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection for reading."""
        if not hasattr(self._readers, "connection"):
            self._readers.connection = _connect(self.path)
        yield self._readers.connection

    def add(self, run: Found) -> int:
        """The number of a run, which it is given when it is first seen."""
        with self._writer as db:
            db.execute(
                "INSERT INTO runs (path, sweep, number) VALUES (?, ?, ?) ON CONFLICT (path) DO UPDATE SET "
                "sweep=excluded.sweep, number=excluded.number",
                (run.path, run.sweep, run.number),
            )
            return int(db.execute("SELECT id FROM runs WHERE path=?", (run.path,)).fetchone()[0])

    def known(self) -> dict[str, int]:
        """Path -> number of every run in the index."""
        return dict(self._writer.execute("SELECT path, id FROM runs"))

    def forget(self, run: int) -> None:
        """Remove a run."""
        with self._writer as db:
            self._clear(db, run)
            db.execute("DELETE FROM runs WHERE id=?", (run,))

    def _clear(self, db: sqlite3.Connection, run: int) -> None:
        db.execute("DELETE FROM pictures WHERE prompt BETWEEN ? AND ?", prompt_range([run]))
        db.execute("DELETE FROM prompts WHERE id BETWEEN ? AND ?", prompt_range([run]))
        db.execute(
            "UPDATE runs SET ledger='', position=0, planned=NULL, named=0, stars='', base=NULL WHERE id=?", (run,)
        )

    def grow(self, run: int) -> Iterator[list[int]]:
        """Take in what the run's ledger and stars have gained; yields the times (ms) of each block of pictures."""
        path, ledger, position = self._writer.execute(
            "SELECT path, ledger, position FROM runs WHERE id=?", (run,)
        ).fetchone()
        try:
            fd = self._folder.open(below(path, RECORDS))
        except OSError:  # not begun, or gone
            return
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if position and (size < position or _identity(file, int(ledger.split()[0])) != ledger):
                with self._writer as db:
                    self._clear(db, run)  # another ledger stands there now
                position = 0
            added, length = False, FIRST_BLOCK
            while position < size:
                file.seek(position)
                block = file.read(min(length, size - position))
                end = block.rfind(b"\n") + 1
                if not end and length < BLOCK and len(block) == length:
                    length = BLOCK
                    continue
                if not end:
                    break  # a line that is being written, or of more than BLOCK bytes
                length = BLOCK
                with self._writer as db:
                    times = self._take(db, run, path, block[:end])
                    position += end
                    name = _identity(file, min(position, HEAD))
                    db.execute("UPDATE runs SET position=?, ledger=? WHERE id=?", (position, name, run))
                added = True
                yield times
        with self._writer as db:
            self._read_prompts(db, run, path)  # those of pictures to come
        self._grow_stars(run, path, anew=added)

    def _take(self, db: sqlite3.Connection, run: int, path: str, block: bytes) -> list[int]:
        rows = [row for record in _objects(block) if (row := _row(run, record)) is not None]
        if rows:
            self._name_prompts(db, run, path, rows)
            db.executemany(_ADD, rows)
        return [row[7] for row in rows if row[7] is not None and row[3] == OK]

    def _name_prompts(self, db: sqlite3.Connection, run: int, path: str, rows: list[tuple[Any, ...]]) -> None:
        """Texts and parameters of the prompts, before their first picture is added."""
        base, overrides = db.execute("SELECT base, overrides FROM runs WHERE id=?", (run,)).fetchone()
        if base is None:
            base, overrides = self._base_of(run, path, rows[0])
            db.execute("UPDATE runs SET base=?, overrides=? WHERE id=?", (base, overrides, run))
        wanted = {row[0]: row[2] for row in rows}
        self._read_prompts(db, run, path, set(wanted))
        for some in _parts(list(wanted), 500):
            known = db.execute(f"SELECT id FROM prompts WHERE id IN ({','.join('?' * len(some))})", some)
            for prompt in set(some) - {row[0] for row in known}:  # a run of an older version, or edited since
                record = read_json(self._folder, below(path, f"{wanted[prompt]}/{RECORD}"))
                text = str(record.get("prompt", ""))
                params = _mapping(record.get("params")) | json.loads(overrides)
                db.execute(
                    "INSERT OR REPLACE INTO prompts VALUES (?, ?, ?, ?, ?)",
                    (prompt, _plain(text), _folded(text), record.get("id"), _params(db, params)),
                )

    def _base_of(self, run: int, path: str, row: tuple[Any, ...]) -> tuple[str, str]:
        """Parameters that the run's prompts share, and those of the command line; both as JSON."""
        settings = read_settings(self._folder, path)
        record = read_json(self._folder, below(path, f"{row[2]}/{RECORD}"))
        numerics, model = _mapping(record.get("numerics")), _mapping(record.get("model"))
        own = {"model": model.get("name"), "engine": numerics.get("engine"), "dtype": numerics.get("dtype")}
        own = {key: value for key, value in own.items() if value is not None}
        # model.dtype=bfloat16 is what the record calls dtype.
        given = {k: v for k, v in settings.parameters.items() if k.rpartition(".")[2] not in own}
        more = given | own
        return json.dumps(settings.sampling or _mapping(record.get("params"))), json.dumps(more)

    def _read_prompts(self, db: sqlite3.Connection, run: int, path: str, wanted: set[int] | None = None) -> None:
        """Go on reading prompts.jsonl until all that are ``wanted`` are known; to its end without any."""
        named, planned, base, overrides = db.execute(
            "SELECT named, planned, base, overrides FROM runs WHERE id=?", (run,)
        ).fetchone()
        if named == ALL_NAMED or base is None:
            return
        if wanted is not None:
            known = db.execute("SELECT id FROM prompts WHERE id BETWEEN ? AND ?", (min(wanted), max(wanted)))
            wanted = wanted - {number for (number,) in known}
        try:
            fd = self._folder.open(below(path, PROMPTS))
        except OSError:
            return
        count, planned = read_settings(self._folder, path).counter(), abs(planned or 0)
        first, numbers, rows = run << 32, {}, []
        common = json.loads(base)
        more = json.loads(overrides)
        with os.fdopen(fd, "rb", buffering=1 << 20) as file:
            file.seek(named)
            while (wanted is None or wanted) and (lines := b"".join(itertools.islice(file, PROMPTS_AT_ONCE))):
                named += len(lines)
                for value in _objects(lines):
                    prompt = _prompt(value)
                    if prompt is None:
                        continue
                    index, text, name, seeds, params = prompt
                    planned += count(text) if seeds is None else seeds
                    key = tuple(params.items())
                    if key not in numbers:
                        numbers[key] = _params(db, common | params | more)
                    rows.append((first + index, text, _folded(text), name, numbers[key]))
                if wanted is not None:
                    wanted.difference_update(row[0] for row in rows)
                db.executemany("INSERT OR REPLACE INTO prompts VALUES (?, ?, ?, ?, ?)", rows)
                rows.clear()
            if not file.read(1):
                named = ALL_NAMED
        planned = planned if named == ALL_NAMED else -planned  # so far
        db.execute("UPDATE runs SET planned=?, named=? WHERE id=?", (planned or None, named, run))

    def _grow_stars(self, run: int, path: str, *, anew: bool) -> None:
        name = below(path, STARS)
        found = self._folder.stat(name)
        stamp = f"{found.st_ino} {found.st_mtime_ns} {found.st_size}" if found else ""
        was = self._writer.execute("SELECT stars FROM runs WHERE id=?", (run,)).fetchone()[0]
        if stamp == was and not (anew and stamp):
            return
        try:
            stars = read_stars(self._folder.read(name, LARGEST), name) if found else Stars()
        except (OSError, UserError):
            return  # whoever marks a picture is told
        with self._writer as db:
            first, last = prompt_range([run])
            db.execute("UPDATE pictures SET star=0 WHERE prompt BETWEEN ? AND ? AND star<>0", (first, last))
            for value, items in ((1, stars.starred), (-1, stars.rejected)):
                db.executemany(
                    "UPDATE pictures SET star=? WHERE prompt=? AND seed=?",
                    ((value, (run << 32) + place[0], place[1]) for item in items if (place := _place(item))),
                )
            db.execute("UPDATE runs SET stars=? WHERE id=?", (stamp, run))

    def close(self) -> None:
        """Close the file; a temporary one is removed. Other threads' connections end with their threads.

        Harmless when called twice.
        """
        self._writer.close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1
        if self._temporary is not None:
            self._temporary.cleanup()


def prompt_range(runs: Iterable[int]) -> tuple[int, int]:
    """Smallest and largest number that a prompt of these runs can have: a run's prompts stand together."""
    numbers = list(runs)
    return min(numbers) << 32, (max(numbers) + 1 << 32) - 1


def index_path(cache: Path, root: str) -> Path:
    """Where the index of a folder is kept."""
    return cache / "view" / f"{hashlib.sha256(root.encode()).hexdigest()[:24]}.sqlite"


def _reserve(path: Path) -> tuple[int, Path, tempfile.TemporaryDirectory[str] | None]:
    """A lock that nobody else has, and the file that goes with it: a temporary one where ``path`` is taken."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return _elsewhere()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another gallery of the same folder
        os.close(lock)
        return _elsewhere()
    return lock, path, None


def _elsewhere() -> tuple[int, Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="zimage_view_")
    return os.open(os.devnull, os.O_RDONLY), Path(folder.name) / "index.sqlite", folder


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;")
    return db


def _open(path: Path) -> sqlite3.Connection:
    """The index; begun anew where it is of another version or damaged."""
    try:
        db = _connect(path)
        if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            db.execute("SELECT count(*) FROM runs").fetchone()
            return db
        db.close()
    except sqlite3.DatabaseError:
        pass
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    db = _connect(path)
    db.executescript(SCHEMA)
    return db


def _identity(file: Any, length: int) -> str:
    """What tells a ledger from another one under the same name: its first bytes, which are never rewritten."""
    return f"{length} {hashlib.sha256(os.pread(file.fileno(), length, 0)).hexdigest()}"


def _objects(lines: bytes) -> list[Any]:
    """JSON of each line, None for a damaged one. Read as one array, which takes half the time."""
    parts = lines.split(b"\n")
    parts = [part for part in parts if part]
    try:
        found = json.loads(b"[%s]" % b",".join(parts))
    except (ValueError, RecursionError):
        found = []
    return found if len(found) == len(parts) else [_object(part) for part in parts]


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _row(run: int, record: Any) -> tuple[Any, ...] | None:
    """A ledger line as a row of ``pictures``; None for one that is damaged."""
    try:
        place = _place(record["item"])
        ok = record["status"] == "ok"
        if place is None:
            return None
        image = record.get("image", IMAGE)
        image = None if image == IMAGE or not _IMAGE.fullmatch(image) else image
        error = None if ok else _plain(str(record.get("error", "")))
        number, seconds = record.get("bytes"), record.get("seconds")
        return (
            (run << 32) + place[0], place[1], record["item"], OK if ok else FAILED, image,
            number if type(number) is int and 0 <= number < 1 << 62 else None,
            float(seconds) if isinstance(seconds, int | float) else None, _milliseconds(record.get("written")), error,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _place(item: str) -> tuple[int, int] | None:
    """Prompt number and seed of an item directory; None for a name that no plan makes."""
    match = _ITEM.fullmatch(item)
    if match is None or (seed := int(match[2])) >= 1 << 63 or not item.isprintable():
        return None
    return int(match[1]), seed


def _milliseconds(written: Any) -> int | None:
    try:
        return round(datetime.fromisoformat(written).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        return None


def _prompt(row: Any) -> tuple[int, str, str | None, int | None, dict[str, Any]] | None:
    """Index, text, id, number of own seeds and own parameters of a line of prompts.jsonl; None if it is damaged."""
    try:
        index, text, name, seeds = row.pop("index"), row.pop("text"), row.pop("id", None), row.pop("seeds", None)
        for key in ("metadata", "source"):
            row.pop(key, None)
        if type(index) is not int or not 0 <= index < 10**9 or type(text) is not str:
            return None
        params = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
        return index, _plain(text), None if name is None else _plain(str(name)), seeds and len(seeds), params
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _params(db: sqlite3.Connection, params: dict[str, Any]) -> int:
    """The number of a set of parameters."""
    text = json.dumps(params, sort_keys=True)
    db.execute("INSERT OR IGNORE INTO params (json) VALUES (?)", (text,))
    return int(db.execute("SELECT id FROM params WHERE json=?", (text,)).fetchone()[0])


def _folded(text: str) -> str | None:
    """What the search looks in; None where it is the text itself."""
    folded = _plain(text.casefold())
    return None if folded == text else folded


def _plain(text: str) -> str:
    """Without lone surrogates, which neither SQLite nor HTTP can carry."""
    return text if _is_text(text) else text.encode("utf-8", "replace").decode()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
