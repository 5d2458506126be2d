"""The thread that follows runs: it finds new ones, grows the index from their ledgers, and says what changed."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from zimage_runner.errors import error_text
from zimage_runner.view.folder import Folder
from zimage_runner.view.index import Index
from zimage_runner.view.runs import find_runs, jobs_in_all
from zimage_runner.view.state import RunState, describe_sweep

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
SEARCH_SECONDS = 2.0
UNWATCHED_SECONDS = 5.0
"""Between two looks while no page is open."""
SEARCH_SHARE = 20
"""A search that takes long is made the less often: 1/20 of the time at most."""
LATEST = 4
"""Pictures on a run's card."""

Listener = Callable[[dict[str, Any]], None]


class Watcher(threading.Thread):
    """Follows the runs below a folder until ``stop``. Its public methods may be called from any thread."""

    def __init__(self, root: str, folder: Folder, index: Index) -> None:
        super().__init__(name="watcher", daemon=True)
        self._root, self._folder, self._index = root, folder, index
        self._states: dict[str, RunState] = {}
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self._wake = threading.Event()
        self._ended = False
        self._is_damaged = False
        self._next_search = 0.0
        self._next_count: dict[int, float] = {}
        self.version = 0
        """Grows whenever the index does."""
        self.ready = threading.Event()
        """Set when every run's ledger has been read once."""
        self.closing = False
        """Listeners end: the gallery is about to."""

    def run(self) -> None:
        while not self._ended:
            try:
                self.look()
            except Exception:  # a fault of one look must not blind the gallery for good
                if self._ended:
                    return
                log.exception("looking at the runs failed")
            self.ready.set()
            self._wake.wait(POLL_SECONDS if self._listeners else UNWATCHED_SECONDS)
            self._wake.clear()

    def look(self) -> None:
        """One look at everything that may have changed. An index that turns out to be damaged is built again."""
        try:
            if self._is_damaged:
                raise ValueError("a reader of the index could not go on")
            self._look()
        except OSError:
            raise
        except Exception as error:
            # A full disk, a lock: nothing is wrong with what is there. Without SQLite's code, it could not be decoded.
            if isinstance(error, sqlite3.OperationalError) and hasattr(error, "sqlite_errorcode"):
                raise
            log.warning("the gallery's index is damaged and is built again (%s)", error_text(error))
            self._index.begin_anew()
            with self._lock:
                self._states.clear()
            self._next_count.clear()
            self._next_search, self._is_damaged = 0.0, False
            self.version += 1
            self._look()

    def rebuild(self) -> None:
        """Have the index built again: somebody who read it found it damaged."""
        self._is_damaged = True
        self._wake.set()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next_search:
            self._search()
            self._next_search = time.monotonic() + max(SEARCH_SECONDS, SEARCH_SHARE * (time.monotonic() - now))
        for state in self.states():
            if self._ended:
                return
            if state.look(self._folder):
                self._next_count.setdefault(state.number, 0.0)
            if state.number in self._next_count:
                self._grow(state)
            elif state.owner is not None:
                self._tell(state)  # its speed and the time left change by themselves

    def _search(self) -> None:
        known = self._index.known()
        found = {run.path: run for run in find_runs(self._root)}
        for path in known.keys() - found.keys():
            self._index.forget(known[path])
            with self._lock:
                self._states.pop(path, None)
            self.version += 1
            self._send({"type": "gone", "run": known[path]})
        for path, run in found.items():
            state = self._states.get(path)
            if state is None or state.found != run:
                number = self._index.add(run)
                with self._lock:
                    self._states[path] = RunState(number=number, found=run)
                self._next_count[number] = 0.0

    def _grow(self, state: RunState) -> None:
        for times in self._index.grow(state.number):
            state.times.extend(times)
            self.version += 1
            self._next_count.setdefault(state.number, 0.0)
            if not self.ready.is_set():
                self._send({"type": "indexing", "run": state.number})
            if self._ended:
                return
        if time.monotonic() >= self._next_count.get(state.number, float("inf")):
            start = time.monotonic()
            with self._index.reading() as db:
                state.count(db, latest=LATEST)
            cost = time.monotonic() - start
            self.version += 1
            del self._next_count[state.number]
            if state.owner is not None and cost > 0.01:
                self._next_count[state.number] = time.monotonic() + SEARCH_SHARE * cost
        self._tell(state)

    def refresh(self, run: int) -> None:
        """Something of the run was changed by ourselves: look at once."""
        self._next_count[run] = 0.0
        self._wake.set()

    def states(self) -> list[RunState]:
        with self._lock:
            return list(self._states.values())

    def state(self, run: int) -> RunState | None:
        return next((state for state in self.states() if state.number == run), None)

    def overview(self) -> dict[str, Any]:
        """All runs and multiruns."""
        runs = [state.describe() for state in self.states()]
        sweeps: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if run["sweep"] is not None:
                sweeps.setdefault(run["sweep"], []).append(run)
        return {
            "runs": runs,
            "sweeps": [describe_sweep(path, jobs, jobs_in_all(self._folder, path)) for path, jobs in sweeps.items()],
            "version": self.version,
            "ready": self.ready.is_set(),
            "root": self._root,
        }

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with every change, from this thread; the function that ends it is returned."""
        self._listeners.add(listener)
        self._wake.set()
        return lambda: self._listeners.discard(listener)

    def _tell(self, state: RunState) -> None:
        if self._listeners:
            self._send({"type": "run", "run": state.describe(), "version": self.version})

    def _send(self, event: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            listener(event)

    def dismiss(self) -> None:
        """Have every listener end. May be called from a signal's handler."""
        self.closing = True
        self._send({"type": "closing"})

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._ended = True
        self._wake.set()
        self.join()


def runs_of(states: Iterable[RunState], scope: str) -> tuple[int, ...] | None:
    """Numbers of the runs that ``scope`` means: all, run:7, or sweep:PATH. None for all, () for none."""
    kind, _, name = scope.partition(":")
    if kind == "run":
        return tuple(state.number for state in states if str(state.number) == name)
    if kind == "sweep":
        return tuple(state.number for state in states if state.found.sweep == name)
    return None
