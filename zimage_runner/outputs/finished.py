"""Finished pictures by what a ledger says of them, and by the names that people give them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.ledger import RECORDS, Entry, parse_line
from zimage_runner.outputs.place import ITEMS, SHARDS, last_line, picture_at, record_at


class Finished(NamedTuple):
    """A finished picture of a run."""

    run: Path
    item: str
    entry: Entry

    @property
    def picture(self) -> Inside:
        """Its file, to be read."""
        return picture_at(self.run, self.item, self.entry.image, self.entry.size, self.entry.place)

    @property
    def record(self) -> Inside:
        """Its record, JSON."""
        return record_at(self.run, self.item, self.entry.place)


def shared_picture(path: Path) -> Finished | None:
    """A picture in a shard by its name: RUN/shards/00000.tar/KEY.png, or RUN/items/00000_a_cat/seed_0/image.png.

    None where a run has none of that name. Raises OSError.
    """
    parts = ("", *path.parts) if len(path.parts) < 4 else path.parts
    if len(parts) < 4:
        return None
    if parts[-4] == ITEMS:
        run, head = Path(*parts[:-4]), b'{"item":' + compact_json("/".join(parts[-4:-1])).encode() + b","
    elif parts[-3] == SHARDS:
        run, head = Path(*parts[:-3]), f'"key":{compact_json(path.stem)},"offset":'.encode()
    else:
        return None
    try:
        line = last_line(run / RECORDS, head)
        item, entry = parse_line(line) if line is not None else ("", None)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    place = None if entry is None else entry.place
    if entry is None or place is None or (parts[-3] == SHARDS and place.shard != "/".join(parts[-3:-1])):
        return None
    return Finished(run, item, entry)


def open_picture(path: Path) -> BinaryIO:
    """A picture's file, or what ``shared_picture`` finds of that name. Raises OSError."""
    found = None if path.is_file() else shared_picture(path)
    return open(path, "rb") if found is None else found.picture.open()
