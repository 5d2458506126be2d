"""What the service remembers of its runs, on disk: one file for each, from the moment it is accepted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError, error_text
from zimage_runner.outputs import atomic
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.lock import RunLock
from zimage_runner.signals import StopRequest

log = logging.getLogger(__name__)

FOLDER = ".serve"
"""Below the output root."""
ENDED_KEPT = 1000
"""Runs that have ended and are still told of."""
QUEUED, RUNNING, DONE, FAILED, STOPPED = "queued", "running", "done", "failed", "stopped"
OPEN = (QUEUED, RUNNING)


@dataclass(kw_only=True, eq=False)
class ServedRun:
    """One run as the service knows it. What is drawn of it stands in its ledger."""

    id: str
    created: float
    """Seconds since 1970."""
    directory: str
    """The run directory, relative to the output root."""
    planned: int
    request: dict[str, Any]
    """Its fields, as they were sent; empty once it has ended."""
    state: str = QUEUED
    error: str | None = None
    started: float | None = None
    """When this process began to draw it, and what was settled then."""
    settled_before: int = 0
    troubles: int = 0
    """Models lost in a row that drew nothing of it."""
    stop: StopRequest = field(default_factory=StopRequest)

    def saved(self) -> dict[str, Any]:
        """What is kept on disk. A run that is being drawn is one that is queued, once its process is gone."""
        names = ("id", "created", "directory", "planned", "request", "error", "troubles")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"state": QUEUED if self.state == RUNNING else self.state}


class RunFiles:
    """The folder of these files, which one process has at a time."""

    def __init__(self, root: Path) -> None:
        """Raises UserError if another process has it, or it cannot be written."""
        self._folder = root / FOLDER
        self._open = contextlib.ExitStack()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._dir_fd = self._open.enter_context(atomic.directory(self._folder))
            lock = RunLock(self._folder, self._dir_fd)
            lock.acquire()
            self._open.callback(lock.release)
            self.uploads = self._folder / "uploads"  # of pictures that are sent to be edited, while they are
            shutil.rmtree(self.uploads, ignore_errors=True)  # what a killed process left
            self.uploads.mkdir(mode=0o700)
        except OSError as error:
            self._open.close()
            reason = error.strerror or error
            raise UserError(f"output.root={root}: {self._folder} cannot be used: {reason}") from None
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Let another process have it. Where nothing was kept it goes."""
        shutil.rmtree(self.uploads, ignore_errors=True)
        self._open.close()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def load(self) -> list[ServedRun]:
        """The runs of earlier processes, oldest first. A file that cannot be read is told and left alone."""
        found: list[ServedRun] = []
        for path in self._folder.glob("run-*.json"):
            try:
                run = ServedRun(**json.loads(path.read_bytes()))
                known = run.id == path.stem and run.state in (QUEUED, DONE, FAILED, STOPPED)
                if not known or not _is_below(run.directory):
                    raise ValueError("a field has a value that none is given")
                found.append(run)
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s is left out: %s", path, error_text(error))
            else:
                run.request = run.request if run.state in OPEN else {}
        gone = self.without_oldest(found)
        return sorted((run for run in found if run not in gone), key=lambda run: run.created)

    def save(self, run: ServedRun) -> None:
        """Write a run's file, safe from power cuts. Raises OSError."""
        atomic.write_file(self._dir_fd, f"{run.id}.json", readable_json(run.saved()), sync=True)
        os.fsync(self._dir_fd)

    def without_oldest(self, runs: Iterable[ServedRun]) -> list[ServedRun]:
        """Forget the oldest runs that have ended, where there are too many. Return them."""
        ended = sorted((run for run in runs if run.state not in OPEN), key=lambda run: run.created)
        gone = ended[: max(0, len(ended) - ENDED_KEPT)]
        for run in gone:
            atomic.remove(self._dir_fd, f"{run.id}.json")
        return gone


def _is_below(directory: Any) -> bool:
    return isinstance(directory, str) and re.fullmatch(r"[^/\0.][^/\0]*/[^/\0.][^/\0]*", directory) is not None
