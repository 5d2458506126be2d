"""How far a run is: its state, progress, speed, the time left and its memory."""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.collect.overrides import varying_fields
from zimage_runner.outputs.ledger import RECORDS
from zimage_runner.outputs.lock import LOCK_NAME, living_owner
from zimage_runner.outputs.stars import STARS
from zimage_runner.view.folder import Folder
from zimage_runner.view.index import prompt_range
from zimage_runner.view.query import rows_of
from zimage_runner.view.rows import FAILED, OK
from zimage_runner.view.runs import SUMMARY, Found, below, read_json

RECENT = 64
"""Pictures that the speed is taken from."""
LARGEST_LOCK = 4096
STALE_SECONDS = 6 * 3600.0
"""A lock of another machine, whose processes cannot be seen, counts as held while the run was changed since then."""


@dataclass(kw_only=True, slots=True)
class RunState:
    """A run as it is now. ``look`` reads its small files; the counts come from the index."""

    number: int
    found: Found
    done: int = 0
    failed: int = 0
    starred: int = 0
    planned: int | None = None
    latest: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    times: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    """When the last pictures were written, in milliseconds since 1970."""
    stamp: tuple[Any, ...] = ()
    """Of the files that the state depends on: nothing has changed while it is the same."""
    owner: dict[str, Any] | None = None
    began: float = 0.0
    """When the process that holds the run took it, in seconds since 1970."""
    changed: float = 0.0
    """When the run was last written to."""
    summary: dict[str, Any] = field(default_factory=dict)

    def look(self, folder: Folder) -> bool:
        """Read what tells the run's state; True if something changed since the last look."""
        files = [folder.stat(below(self.found.path, name)) for name in (RECORDS, LOCK_NAME, SUMMARY, STARS)]
        _, lock, summary, _ = files
        self.owner = self._owner(folder) if lock is not None else None
        stamp = (*((f.st_ino, f.st_size, f.st_mtime_ns) if f else None for f in files), self.owner is None)
        if stamp == self.stamp:
            return False
        if summary is not None and (not self.stamp or stamp[2] != self.stamp[2]):
            self.summary = read_json(folder, below(self.found.path, SUMMARY), 256 << 20)
        self.summary = self.summary if summary is not None else {}
        self.changed = max((f.st_mtime for f in files if f), default=0.0)
        self.began = lock.st_mtime if lock is not None else 0.0
        self.stamp = stamp
        return True

    def count(self, db: sqlite3.Connection, *, latest: int) -> None:
        """Counts, parameters and the ``latest`` pictures, from the index."""
        first, last = prompt_range([self.number])
        counted = db.execute(
            "SELECT status, count(*), sum(star=1) FROM pictures WHERE prompt BETWEEN ? AND ? GROUP BY 1", (first, last)
        )
        counts = {status: (count, stars) for status, count, stars in counted}
        self.done, self.failed = counts.get(OK, (0, 0))[0], counts.get(FAILED, (0, 0))[0]
        self.starred = sum(stars for _, stars in counts.values())
        newest = db.execute(
            "SELECT id FROM pictures WHERE prompt BETWEEN ? AND ? AND status=? ORDER BY written DESC LIMIT ?",
            (first, last, OK, latest),
        )
        self.latest = [{"id": row["id"], "v": row["v"]} for row in rows_of(db, [row[0] for row in newest])]
        planned, base, overrides = db.execute(
            "SELECT planned, base, overrides FROM runs WHERE id=?", (self.number,)
        ).fetchone()
        self.planned = planned if planned is not None and planned > 0 else None
        self.parameters = json.loads(base or "{}") | json.loads(overrides)

    def _owner(self, folder: Folder) -> dict[str, Any] | None:
        try:
            owner = living_owner(folder.read(below(self.found.path, LOCK_NAME), LARGEST_LOCK))
        except OSError:
            return None
        if owner is not None and not _is_here(owner) and time.time() - self.changed > STALE_SECONDS and self.stamp:
            return None
        return owner

    @property
    def state(self) -> str:
        """running, finished, failures, interrupted, or empty for a run that never had a picture."""
        if self.owner is not None:
            return "running"
        settled = self.done + self.failed
        planned = self.planned or _number(self.summary.get("items"), "planned")
        if not settled:
            return "empty" if not planned else "interrupted"
        if (planned is not None and settled < planned) or (planned is None and not self.summary):
            return "interrupted"
        return "failures" if self.failed else "finished"

    def describe(self) -> dict[str, Any]:
        """What the page shows of it."""
        planned = self.planned or _number(self.summary.get("items"), "planned")
        running = self.owner is not None
        speed = self._speed() if running else _number(self.summary.get("images"), "images_per_second")
        left = max(0, planned - self.done - self.failed) if planned is not None else None
        return {
            "id": self.number,
            "path": self.found.path,
            "sweep": self.found.sweep,
            "job": self.found.number,
            "state": self.state,
            "loading": running and not self.times and left != 0,
            "done": self.done,
            "failed": self.failed,
            "starred": self.starred,
            "planned": planned,
            "speed": speed,
            "left_seconds": left / speed if running and speed and left else None,
            "memory": self._memory(running),
            "changed": round(self.changed * 1000),
            "stopped": str(self.summary.get("stopped") or "")[:300] if not running else "",
            "seconds": _number(self.summary, "total_seconds") if not running else None,
            "latest": self.latest,
            "parameters": self.parameters,
        }

    def _speed(self) -> float | None:
        times = [stamp for stamp in self.times if stamp >= self.began * 1000]
        if len(times) < 2 or times[-1] <= times[0]:
            return None
        # A pause that goes on counts too, else a hanging run would look fast.
        span = max(times[-1] - times[0], time.time() * 1000 - times[0] - 3 * (times[-1] - times[0]) / len(times))
        return (len(times) - 1) / (span / 1000)

    def _memory(self, running: bool) -> dict[str, float]:
        """GB of host and GPU memory: the process's own now, or the run's peaks."""
        if running:
            host = _resident_gb(self.owner) if self.owner else None
            return {"host": host} if host is not None else {}
        session = self.summary.get("session")
        gpu = _number(session.get("gpu_memory"), "peak_reserved_gb") if isinstance(session, dict) else None
        host = _number(session, "peak_host_gb")
        return {name: value for name, value in (("gpu", gpu), ("host", host)) if value}


def describe_sweep(path: str, jobs: Iterable[dict[str, Any]], in_all: int) -> dict[str, Any]:
    """A multirun from what ``RunState.describe`` says of its jobs; ``in_all``: how many there are in all."""
    jobs = list(jobs)
    begun_all = len(jobs) >= in_all
    states = {job["state"] for job in jobs} | (set() if begun_all else {"interrupted"})
    order = ("running", "interrupted", "failures", "finished", "empty")
    total = {key: sum(job[key] for job in jobs) for key in ("done", "failed", "starred")}
    planned = [job["planned"] for job in jobs]
    speeds = [job["speed"] for job in jobs if job["state"] == "running" and job["speed"]]
    left = sum(max(0, (job["planned"] or 0) - job["done"] - job["failed"]) for job in jobs)
    return {
        "path": path,
        "state": next(state for state in order if state in states),
        **total,
        "planned": sum(planned) if begun_all and None not in planned else None,
        "speed": sum(speeds) or None,
        "left_seconds": left / sum(speeds) if speeds and left and begun_all else None,
        "changed": max(job["changed"] for job in jobs),
        "memory": {
            kind: max(job["memory"].get(kind, 0.0) for job in jobs)
            for kind in ("gpu", "host")
            if any(kind in job["memory"] for job in jobs)
        },
        "seconds": sum(job["seconds"] or 0.0 for job in jobs) or None if "running" not in states else None,
        "latest": [picture for job in jobs for picture in job["latest"][:2]][:6],
        "jobs": [job["id"] for job in jobs],
        "jobs_in_all": max(len(jobs), in_all),
        "varying": varying_fields(job["parameters"] for job in jobs),
    }


def _number(mapping: Any, key: str) -> Any:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_here(owner: dict[str, Any]) -> bool:
    return owner["host"] == socket.gethostname()


def _resident_gb(owner: dict[str, Any]) -> float | None:
    """Memory of the process that draws, when it is one of this machine."""
    if not _is_here(owner) or not isinstance(owner["pid"], int):
        return None
    try:
        for line in Path(f"/proc/{owner['pid']}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return None
