"""One picture of a run as the gallery and reports read it: a file below their folder, or a piece of a shard."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.ledger import IMAGE
from zimage_runner.outputs.parsed import from_json, mapping
from zimage_runner.outputs.place import RECORD, SHARDS, Piece, Place
from zimage_runner.outputs.store import STATE, parsed
from zimage_runner.view.folder import Folder
from zimage_runner.view.runs import LARGEST_RECORD, below, read_json

COLUMNS = "image, bytes, shard, offset, record_offset, record_bytes"
"""Of the index's table of pictures: what ``Stored.of_row`` takes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a picture and its record are."""

    run: str
    """Its run directory, relative to the folder."""
    item: str
    image: str
    size: int
    place: Place | None

    @classmethod
    def of_row(cls, run: str, item: str, row: Sequence[Any]) -> Stored:
        """From the ``COLUMNS`` of the index."""
        image, size, shard, *numbers = row
        place = None if shard is None else Place(f"{SHARDS}/{shard}", *numbers)
        return cls(run, item, image or IMAGE, size or 0, place)

    @property
    def name(self) -> str:
        """The picture's file below the folder; for one of a shard what it would be called."""
        return below(self.run, f"{self.item}/{self.image}")

    def file(self, folder: Folder) -> Inside:
        """The picture, to be read."""
        if self.place is None:
            return Inside(Path(folder.path), self.name)
        return self._piece(folder, self.place, self.place.offset, self.size, self.name)

    def read(self, folder: Folder, limit: int) -> bytes:
        """The picture's file. Raises OSError, also when it has more than ``limit`` bytes."""
        if self.place is None:
            return folder.read(self.name, limit)
        if self.size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.name)
        return self.file(folder).read_bytes()

    def record(self, folder: Folder) -> dict[str, Any]:
        """Its record; empty where there is none that can be read."""
        name, place = below(self.run, f"{self.item}/{RECORD}"), self.place
        if place is None:
            return read_json(folder, name)
        if place.record_bytes > LARGEST_RECORD:
            return {}
        try:
            piece = self._piece(folder, place, place.record_offset, place.record_bytes, name)
            return mapping(from_json(piece.read_bytes()))
        except (OSError, ValueError):
            return {}

    def damage(self, folder: Folder) -> str:
        """What is wrong with the file, as far as its size tells; empty where nothing is."""
        if self.place is not None:
            found = folder.stat(below(self.run, self.place.shard))
            if found is None:
                return "" if self._is_uploaded(folder) else f"{self.place.shard} is not here"
            return f"{self.place.shard} was cut off" if found.st_size < self.place.offset + self.size else ""
        found = folder.stat(self.name)
        if found is None:
            return "the file is missing"
        if self.size and found.st_size != self.size:
            return f"the file has {found.st_size:,} bytes instead of {self.size:,}"
        return ""

    def _is_uploaded(self, folder: Folder) -> bool:
        try:
            uploaded = parsed(folder.read(below(self.run, STATE), LARGEST_RECORD))
        except OSError:
            return False
        return self.place is not None and self.place.shard in uploaded

    def _piece(self, folder: Folder, place: Place, offset: int, size: int, name: str) -> Piece:
        return Piece(Path(folder.path), below(self.run, place.shard), offset, size, name)
