"""The finished pictures of runs, as their ledgers have them."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside, NotPlain, Statuses
from zimage_runner.outputs.ledger import RECORD, RECORDS, Ledger
from zimage_runner.outputs.stars import load_stars

log = logging.getLogger(__name__)

_ITEM = re.compile(r"items/[0-9]{5,12}_[^/\\]+/seed_[0-9]+")
"""A ledger is a file that anybody may have written: nothing outside of its run is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One finished picture."""

    run: Path
    item: str
    """Its directory below the run directory."""
    file: str
    """Its file's name in there."""

    @property
    def path(self) -> Path:
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
    def _folder(self) -> str:
        return self.item.split("/")[-2]

    @property
    def image(self) -> Inside:
        """Its file, to be read."""
        return Inside(self.run, f"{self.item}/{self.file}")

    def record(self) -> dict[str, Any]:
        """Its record.json."""
        file = self.run / self.item / RECORD
        try:
            record = json.loads(Inside(self.run, f"{self.item}/{RECORD}").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read ({error}): draw it again with resume={self.run} verify=true"
            ) from None
        if not isinstance(record, dict):
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

    Files that are shorter than when they were written (cut off, empty) are left out and told of in a warning.
    """
    for run in runs:
        entries = {item: e for item, e in Ledger.load(run / RECORDS).entries.items() if e.ok and _ITEM.fullmatch(item)}
        pictures = [Picture(run=run, item=item, file=entry.image) for item, entry in entries.items()]
        damaged: list[str] = []
        with atomic.directory(run) as dir_fd:
            status = Statuses(dir_fd)
            for picture in sorted(pictures, key=lambda picture: picture.index):
                size = _size(status, picture)
                if size is not None and size >= entries[picture.item].size:
                    yield picture
                elif size is not None:
                    damaged.append(f"{picture.item}: {size:,} bytes instead of {entries[picture.item].size:,}")
        if damaged:
            many = f"{len(damaged):,} damaged pictures are" if len(damaged) > 1 else "a damaged picture is"
            log.warning("%s left out (%s): draw again with resume=%s", many, damaged[0], run)


def marked(pictures: Iterable[Picture], *, starred: bool, rejected: bool) -> Iterator[Picture]:
    """Of ``pictures``, only starred ones, or those that were rejected left out. Raises UserError for damaged stars."""
    for run, some in itertools.groupby(pictures, lambda picture: picture.run):
        stars = load_stars(run)
        for picture in some:
            if (picture.item in stars.starred or not starred) and (rejected or picture.item not in stars.rejected):
                yield picture


def _size(status: Statuses, picture: Picture) -> int | None:
    """Bytes of a picture's file; None where it is not there."""
    try:
        return status(picture.image.relative).st_size
    except NotPlain as error:
        raise UserError(f"{picture.run}: {error.strerror}") from None
    except OSError:
        return None
