"""The finished pictures of runs, as their ledgers have them."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside, NotPlain, Statuses
from zimage_runner.outputs.config import Format
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.metadata import SHAPES
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import RECORD, Place, picture_at, record_at
from zimage_runner.outputs.stars import load_stars

log = logging.getLogger(__name__)

NAMED = 20
"""Damaged pictures that a warning names."""
_ENDS = {
    ".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    ".jpg": (b"\xff\xd8\xff", b"\xff\xd9"),
    ".webp": (b"RIFF", b""),
}
"""The first and last bytes of a picture file, by its suffix; of other formats nothing is known."""
SUFFIXES = frozenset(format.suffix for format in Format)

_ITEM = re.compile(r"items/[0-9]{5,12}_[^/\\]+/seed_[0-9]{1,19}")
"""A ledger is a file that anybody may have written: nothing outside of its run is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One finished picture."""

    run: Path
    item: str
    """Its directory below the run directory."""
    file: str
    """Its file's name in there."""
    size: int
    """Bytes of its file when it was drawn."""
    place: Place | None = None
    """Where it is in a shard; None for a file."""

    @property
    def path(self) -> Path:
        """Its file; for a picture of a shard the name by which it can be read all the same (``outputs.place.find``)."""
        return self.run / self.item / self.file

    @property
    def index(self) -> int:
        """The prompt's number."""
        return int(self._folder.partition("_")[0])

    @property
    def slug(self) -> str:
        """What its folder is called after the number: from the prompt's id or text."""
        return self._folder.partition("_")[2]

    @property
    def seed(self) -> int:
        return int(self.item.rpartition("_")[2])

    @property
    def _folder(self) -> str:
        return self.item.split("/")[-2]

    @property
    def image(self) -> Inside:
        """Its file, to be read."""
        return picture_at(self.run, self.item, self.file, self.size, self.place)

    def record(self) -> dict[str, Any]:
        """Its record.json."""
        file = self.run / self.item / RECORD
        try:
            record = from_json(record_at(self.run, self.item, self.place).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read ({error}): draw it again with resume={self.run} verify=true"
            ) from None
        if not isinstance(record, dict) or any(
            name in record and not isinstance(record[name], kind) for name, kind in SHAPES.items()
        ):
            raise UserError(f"{file} is no record: draw it again with resume={self.run} verify=true")
        return record


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return every run that is among ``folders`` or lies below one of them; each once, in this order."""
    runs: list[Path] = []
    for given in folders:
        found = [given] if (given / RECORDS).is_file() else sorted(file.parent for file in given.rglob(RECORDS))
        if not found:
            what = "holds no run" if given.is_dir() else "is no directory"
            raise UserError(f"{given} {what}: give a run directory, which every run prints, or a folder of runs")
        runs += found
    return list(dict.fromkeys(run.absolute() for run in runs))


def pictures_of(runs: Iterable[Path]) -> Iterator[Picture]:
    """Finished pictures whose file is still there: by run, then prompt, then as they were drawn.

    Files that are no whole pictures any more (cut off, empty, zeros) are left out and named in a warning.
    """
    for run in runs:
        entries = {item: e for item, e in Ledger.load(run / RECORDS).entries.items() if e.ok and _ITEM.fullmatch(item)}
        pictures = [
            Picture(run=run, item=item, file=entry.image, size=entry.size, place=entry.place)
            for item, entry in entries.items()
        ]
        pictures = [picture for picture in pictures if picture.path.suffix in SUFFIXES]
        damaged: list[str] = []
        with atomic.directory(run) as dir_fd:
            status = Statuses(dir_fd)
            for picture in sorted(pictures, key=lambda picture: picture.index):
                size = picture.size if picture.place is not None else _size(status, picture)
                if size is None:
                    continue
                reason = _damage(picture, size, entries[picture.item].size)
                if reason is None:
                    yield picture
                else:
                    damaged.append(f"{picture.item}: {reason}")
        if damaged:
            many = f"{len(damaged):,} damaged pictures are" if len(damaged) > 1 else "a damaged picture is"
            more = f"; and {len(damaged) - NAMED:,} more" if len(damaged) > NAMED else ""
            names = "; ".join(sorted(damaged)[:NAMED]) + more  # two threads write: as drawn is in any order
            log.warning("%s left out (%s): draw again with resume=%s verify=true", many, names, run)


def marked(pictures: Iterable[Picture], *, starred: bool, rejected: bool) -> Iterator[Picture]:
    """Of ``pictures``, only starred ones, or those that were rejected left out. Raises UserError for damaged stars."""
    for run, some in itertools.groupby(pictures, lambda picture: picture.run):
        stars = load_stars(run)
        for picture in some:
            if (picture.item in stars.starred or not starred) and (rejected or picture.item not in stars.rejected):
                yield picture


def _damage(picture: Picture, size: int, written: int) -> str | None:
    """Why a file of ``size`` bytes, of ``written`` when it was drawn, is no whole picture; None if it looks like one.

    Longer ones were edited since. Not all of it is read: what a power cut or a full disk leaves shows at its ends.
    """
    if size < written:
        return f"{size:,} bytes instead of {written:,}"
    first, last = _ENDS.get(picture.path.suffix, (b"", b""))
    try:
        with picture.image.open(0) as file:
            begins = file.read(len(first)) == first
            file.seek(-len(last), os.SEEK_END)
            ends = size > written or file.read(len(last)) == last
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if begins and ends else "its bytes changed"


def _size(status: Statuses, picture: Picture) -> int | None:
    """Bytes of a picture's file; None where it is not there."""
    try:
        return status(picture.image.relative).st_size
    except NotPlain as error:
        raise UserError(f"{picture.run}: {error.strerror}") from None
    except OSError:
        return None
