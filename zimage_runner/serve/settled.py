"""What of a run is drawn or has failed, read from its ledger as it grows: only what is new is read again."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from pathlib import Path

from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.ledger import RECORDS, Entry, parse_line

KEPT = 8
"""Runs whose items are kept in memory."""


class Settled:
    """Items of a run in the order in which they were first settled."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._forget()

    def _forget(self) -> None:
        self._end = 0
        self.items: list[tuple[str, Entry]] = []
        self._places: dict[str, int] = {}
        self.ok = 0

    def read_on(self) -> None:
        """Read what was appended. A ledger that became shorter, or is gone, is read from its start."""
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            Inside(self._directory, RECORDS).open() as file,
        ):
            file.seek(0, 2)
            if file.tell() < self._end:
                self._forget()
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                self._end += len(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._add(*parse_line(line))
            return
        self._forget()

    @property
    def failed(self) -> int:
        """Items without a picture."""
        return len(self.items) - self.ok

    def _add(self, item: str, entry: Entry) -> None:
        place = self._places.setdefault(item, len(self.items))
        if place == len(self.items):
            self.items.append((item, entry))
        else:
            self.ok -= self.items[place][1].ok
            self.items[place] = (item, entry)
        self.ok += entry.ok


class SettledItems:
    """``Settled`` of the runs that were asked for last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[Path, Settled] = OrderedDict()

    def counts(self, directory: Path) -> tuple[int, int]:
        """Pictures that are drawn, and items that failed. Raises OSError."""
        with self._lock:
            settled = self._of(directory)
            return settled.ok, settled.failed

    def items(self, directory: Path, offset: int = 0, limit: int = 1) -> tuple[int, list[tuple[str, Entry]]]:
        """How many there are, and some of them. Raises OSError."""
        with self._lock:
            settled = self._of(directory)
            return len(settled.items), settled.items[offset : offset + limit]

    def _of(self, directory: Path) -> Settled:
        settled = self._runs.setdefault(directory, Settled(directory))
        self._runs.move_to_end(directory)
        if len(self._runs) > KEPT:
            self._runs.popitem(last=False)
        settled.read_on()
        return settled
