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

from zimage_runner.outputs.beneath import Inside, open_file

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
        """All of it, in memory."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Its bytes, from where the shard was uploaded to if it is not here. Raises NotPlain, OSError."""
        try:
            with Inside(self.root, self.relative).open(0) as file:
                return read_piece(file.fileno(), self.offset, self.size, self.relative)
        except FileNotFoundError:
            from zimage_runner.outputs.uploads import read_back

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


def split_path(path: Path) -> tuple[Path, str, str] | None:
    """Run directory, item and file name of a path below a run's ``items``; None for other paths."""
    parts = path.parts
    if len(parts) < 5 or parts[-4] != ITEMS:
        return None
    return Path(*parts[:-4]), "/".join(parts[-4:-1]), parts[-1]


def line_of(ledger: Path, item: str) -> bytes | None:
    """The last whole line that a ledger has of an item, without reading the others. Raises OSError."""
    from zimage_runner.outputs.json_text import compact_json

    head = b'{"item":' + compact_json(item).encode() + b","
    root = os.open(ledger.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.fdopen(open_file(root, ledger.name), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                start = text.rfind(head)
                while start > 0 and text[start - 1] != 0x0A:  # within another line
                    start = text.rfind(head, 0, start)
                end = text.find(b"\n", start) if start >= 0 else -1
                return text[start : end + 1] if end >= 0 else None
    finally:
        os.close(root)
