"""Where a finished picture and its record are: in files of their own, or pieces of a shard. The one way to read them.

A folder of its own is ``items/<index>_<slug>/seed_<seed>/``. A piece is named by the ledger, with its position, so that
nothing is searched for. Pieces are read like files, so readers need not know which of the two a run has.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zimage_runner.outputs.beneath import Inside

SHARDS = "shards"
"""The folder of a run directory that holds its shards."""
TAR, PARQUET = re.compile(r"shards/([0-9]{5,9})\.tar"), re.compile(r"shards/train-([0-9]{5,9})\.parquet")
RECORD = "record.json"
ITEMS = "items"


class Place(NamedTuple):
    """A picture and its record in a shard."""

    shard: str
    """shards/00000.tar or shards/train-00000.parquet, relative to the run directory."""
    offset: int
    """Where the picture's file begins in it."""
    record_offset: int
    record_bytes: int


def place_in(record: dict[str, Any]) -> Place | None:
    """The place that a line of the ledger names; None for files. Raises ValueError, KeyError for what no run writes."""
    shard = record.get("shard")
    if shard is None:
        return None
    numbers = record["offset"], record["record_offset"], record["record_bytes"]
    if not (isinstance(shard, str) and (TAR.fullmatch(shard) or PARQUET.fullmatch(shard))):
        raise ValueError("the shard's name is none of ours")
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("no position in a file")
    return Place(sys.intern(shard), *numbers)


def fields_of(place: Place, key: str) -> dict[str, Any]:
    """What a line of the ledger says of a place; ``key`` names the sample in the shard."""
    return {
        "shard": place.shard,
        "key": key,
        "offset": place.offset,
        "record_offset": place.record_offset,
        "record_bytes": place.record_bytes,
    }


@dataclass(frozen=True, slots=True)
class Piece(Inside):
    """A part of a file below a directory: read as if it were a file itself."""

    offset: int
    size: int
    called: str
    """The file's name below ``root`` in a run of folders: for messages, tables and names of copies."""

    @property
    def path(self) -> Path:
        """Where it would be in a run of folders."""
        return self.root / self.called

    def open(self, buffering: int = -1) -> BinaryIO:
        """All of it, in memory; by the name of its path."""
        stream = io.BytesIO(self.read_bytes())
        stream.name = str(self.path)  # as a file has one
        return stream

    def read_bytes(self) -> bytes:
        """Its bytes, from where the shard was uploaded to if it is not here. Raises NotPlain, OSError."""
        try:
            with Inside(self.root, self.relative).open(0) as file:
                return read_piece(file.fileno(), self.offset, self.size, self.relative)
        except FileNotFoundError:
            from zimage_runner.outputs.store import read_back

            return read_back(self.root, self.relative, self.offset, self.size)


def read_piece(fd: int, offset: int, size: int, name: str) -> bytes:
    """``size`` bytes of an open file. Raises OSError where it ends before."""
    if offset + size > os.fstat(fd).st_size:  # asked first: a damaged ledger must not have gigabytes reserved
        raise OSError(errno.EIO, f"{name} was cut off")
    data = os.pread(fd, size, offset)
    while len(data) < size:  # one call reads 2 GB at most
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"{name} was cut off")
        data += more
    return data


def picture_at(root: Path, item: str, image: str, size: int, place: Place | None) -> Inside:
    """An item's picture: its file, or its piece of a shard."""
    called = f"{item}/{image}"
    return Inside(root, called) if place is None else Piece(root, place.shard, place.offset, size, called)


def record_at(root: Path, item: str, place: Place | None) -> Inside:
    """An item's record, JSON: its file, or its piece of a shard."""
    called = f"{item}/{RECORD}"
    return (
        Inside(root, called)
        if place is None
        else Piece(root, place.shard, place.record_offset, place.record_bytes, called)
    )


def last_line(ledger: Path, part: bytes) -> bytes | None:
    """The last whole line of a ledger that has ``part`` in it, found without reading the others. Raises OSError."""
    with Inside(ledger.parent, ledger.name).open() as file:
        if os.fstat(file.fileno()).st_size == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            whole = text.rfind(b"\n") + 1
            found = text.rfind(part, 0, whole)
            if found < 0:
                return None
            start = text.rfind(b"\n", 0, found) + 1
            return text[start : text.find(b"\n", found) + 1]
