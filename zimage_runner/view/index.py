"""The index: every picture of every run in one SQLite file, built once and grown from what the ledgers gain.

The ledger remains the truth: the file may be deleted at any time. One thread writes, others read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs.ledger import RECORDS, records
from zimage_runner.outputs.parsed import mapping
from zimage_runner.outputs.stars import LARGEST, STARS, Stars, read_stars
from zimage_runner.view.folder import Folder
from zimage_runner.view.index_file import connect, elsewhere, new_index, open_index, reserve
from zimage_runner.view.rows import OK, folded, ledger_row, objects, place_of, plain, prompt_row
from zimage_runner.view.runs import PROMPTS, Found, below, read_settings
from zimage_runner.view.stored import Stored

BLOCK = 4 << 20
"""Bytes of a ledger that are read and committed at once."""
FIRST_BLOCK = 256 << 10
"""The first ones, so that there is soon something to see."""
HEAD = 4096
"""Bytes of a ledger by which it is known again."""
PROMPTS_AT_ONCE = 2000
ALL_NAMED = -1
"""Instead of a position in prompts.jsonl: it was read to its end."""
_ADD = """
INSERT INTO pictures (prompt, seed, item, status, image, bytes, seconds, written, error,
    shard, offset, record_offset, record_bytes)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (prompt, seed) DO UPDATE SET item=excluded.item, status=excluded.status, image=excluded.image,
    bytes=excluded.bytes, seconds=excluded.seconds, written=excluded.written, error=excluded.error,
    shard=excluded.shard, offset=excluded.offset, record_offset=excluded.record_offset,
    record_bytes=excluded.record_bytes
"""


class Index:
    """The pictures of the runs below ``folder``. ``grow`` and ``forget`` belong to one thread."""

    def __init__(self, folder: Folder, path: Path | None) -> None:
        """``path``: where the index is kept; None for one that goes with this object."""
        self._folder = folder
        self._lock_file, self.path, self._temporary = reserve(path) if path else elsewhere()
        self._readers = threading.local()
        self._writer = open_index(self.path)
        self._generation = 0

    def begin_anew(self) -> None:
        """Throw away what is in the index: it is damaged, and the ledgers have it all. For the thread that writes."""
        self._writer.close()
        self._writer = new_index(self.path)
        self._generation += 1

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection for reading."""
        if getattr(self._readers, "generation", None) != self._generation:
            self._readers.connection, self._readers.generation = connect(self.path), self._generation
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
        rows = [row for record in records(block) if (row := ledger_row(run, record)) is not None]
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
        wanted = {row[0]: stored_of(path, row) for row in rows}
        self._read_prompts(db, run, path, set(wanted))
        for some in _parts(list(wanted), 500):
            known = db.execute(f"SELECT id FROM prompts WHERE id IN ({','.join('?' * len(some))})", some)
            for prompt in set(some) - {row[0] for row in known}:  # a run of an older version, or edited since
                record = wanted[prompt].record(self._folder)
                text = str(record.get("prompt", ""))
                params = mapping(record.get("params")) | json.loads(overrides)
                db.execute(
                    "INSERT OR REPLACE INTO prompts VALUES (?, ?, ?, ?, ?)",
                    (prompt, plain(text), folded(text), record.get("id"), _params(db, params)),
                )

    def _base_of(self, run: int, path: str, row: tuple[Any, ...]) -> tuple[str, str]:
        """Parameters that the run's prompts share, and those of the command line; both as JSON."""
        settings = read_settings(self._folder, path)
        record = stored_of(path, row).record(self._folder)
        numerics, model = mapping(record.get("numerics")), mapping(record.get("model"))
        own = {"model": model.get("name"), "engine": numerics.get("engine"), "dtype": numerics.get("dtype")}
        own = {key: value for key, value in own.items() if value is not None}
        # model.dtype=bfloat16 is what the record calls dtype.
        given = {k: v for k, v in settings.parameters.items() if k.rpartition(".")[2] not in own}
        more = given | own
        return json.dumps(settings.sampling or mapping(record.get("params"))), json.dumps(more)

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
                for value in objects(lines):
                    prompt = prompt_row(value)
                    if prompt is None:
                        continue
                    index, text, name, seeds, params = prompt
                    planned += count(text) if seeds is None else seeds
                    key = tuple(params.items())
                    if key not in numbers:
                        numbers[key] = _params(db, common | params | more)
                    rows.append((first + index, text, folded(text), name, numbers[key]))
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
                    ((value, (run << 32) + place[0], place[1]) for item in items if (place := place_of(item))),
                )
            db.execute("UPDATE runs SET stars=? WHERE id=?", (stamp, run))

    def close(self) -> None:
        """Close this thread's connections; a temporary file is removed. Other threads' end with their threads.

        Harmless when called twice.
        """
        self._writer.close()
        if hasattr(self._readers, "connection"):
            self._readers.connection.close()
            del self._readers.connection
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1
        if self._temporary is not None:
            self._temporary.cleanup()


def stored_of(path: str, row: tuple[Any, ...]) -> Stored:
    """Where the picture of a row of ``ledger_row`` is."""
    return Stored.of_row(path, row[2], (row[4], row[5], *row[9:]))


def prompt_range(runs: Iterable[int]) -> tuple[int, int]:
    """Smallest and largest number that a prompt of these runs can have: a run's prompts stand together."""
    numbers = list(runs)
    return min(numbers) << 32, (max(numbers) + 1 << 32) - 1


def _params(db: sqlite3.Connection, params: dict[str, Any]) -> int:
    """The number of a set of parameters."""
    text = json.dumps(params, sort_keys=True)
    db.execute("INSERT OR IGNORE INTO params (json) VALUES (?)", (text,))
    return int(db.execute("SELECT id FROM params WHERE json=?", (text,)).fetchone()[0])


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _identity(file: Any, length: int) -> str:
    """What tells a ledger from another one under the same name: its first bytes, which are never rewritten."""
    return f"{length} {hashlib.sha256(os.pread(file.fileno(), length, 0)).hexdigest()}"
