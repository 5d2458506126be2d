"""Stars and rejections: one small file in the run directory. Resuming a run does not look at it.

{"starred": ["items/00000_a_cat/seed_1", ...], "rejected": [...]}
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.parsed import from_json

STARS = "stars.json"
LARGEST = 256 << 20


@dataclass(kw_only=True, slots=True)
class Stars:
    """Items of a run by what a person thought of them."""

    starred: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)

    def mark(self, item: str, star: int) -> None:
        """``star``: 1 starred, -1 rejected, 0 neither."""
        for value, items in ((1, self.starred), (-1, self.rejected)):
            (items.add if star == value else items.discard)(item)

    def to_json(self) -> bytes:
        return readable_json({"starred": sorted(self.starred), "rejected": sorted(self.rejected)})


def read_stars(data: bytes, where: str) -> Stars:
    """Stars from the file's bytes. Raises UserError if they are not what this module writes."""
    try:
        value = from_json(data)
        return Stars(starred=_names(value["starred"]), rejected=_names(value["rejected"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is damaged: repair or remove it (its stars are lost then)") from None


def _names(value: Any) -> set[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("not a list of names")
    return set(value)


def load_stars(run_dir: str | os.PathLike[str]) -> Stars:
    """The stars of a run directory; none where there is no file. Raises UserError if it is damaged."""
    path = Path(run_dir) / STARS
    try:
        return read_stars(beneath.Inside(Path(run_dir), STARS).read_bytes(), str(path))
    except FileNotFoundError:
        return Stars()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def starred(run_dir: str | os.PathLike[str]) -> set[str]:
    """Item directories (``items/00000_a_cat/seed_1``) that were starred."""
    return load_stars(run_dir).starred


def mark(dir_fd: int, items: dict[str, int], where: str) -> Stars:
    """Change the stars of ``items`` (1 starred, -1 rejected, 0 neither) in the run directory open at ``dir_fd``.

    Several viewers may do so at once. Raises UserError for a damaged file, and OSError.
    """
    fcntl.flock(dir_fd, fcntl.LOCK_EX)  # the directory itself: a run locks its .lock file
    try:
        stars = _load_at(dir_fd, where)
        for item, star in items.items():
            stars.mark(item, star)
        atomic.write_file(dir_fd, STARS, stars.to_json())
        return stars
    finally:
        fcntl.flock(dir_fd, fcntl.LOCK_UN)


def _load_at(dir_fd: int, where: str) -> Stars:
    try:
        fd = beneath.open_file(dir_fd, STARS)
    except FileNotFoundError:
        return Stars()
    with os.fdopen(fd, "rb") as file:
        return read_stars(file.read(LARGEST), f"{where}/{STARS}")
