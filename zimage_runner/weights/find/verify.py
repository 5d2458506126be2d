"""Full sha256 of weights files: on request and on first use, remembered in the runner's cache.

A digest is remembered under the file's path together with its size, times and inode, so that an unchanged file is
hashed once. Nothing is ever written beside the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.weights.cache import read_entry, write_entry
from zimage_runner.weights.io import Threads

log = logging.getLogger(__name__)

THREADS = 8
PIECE = 8 * 1024 * 1024
LARGE = 1_000_000_000
"""Bytes; hashing more than this shows that it is at work."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """What is known of one file."""

    path: Path
    sha256: str
    remembered: bool
    """The digest was not computed now: size, mtime and inode are those of the last time."""
    expected: str | None
    """The hub's digest where the file's place tells it, else that of the first use; None at the first use."""
    expected_from: str = ""
    """Where the expectation comes from, for messages."""

    @property
    def is_altered(self) -> bool:
        return self.expected is not None and self.expected != self.sha256


def file_digests(paths: Sequence[Path], force: bool = False) -> list[FileDigest]:
    """sha256 of each file, from memory where its stat is unchanged, unless ``force``. Files are hashed side by side.

    The first digest of a path is what later ones are compared with; ``forget`` makes the present one the first.
    """
    known = {path: None if force else _unchanged_entry(path) for path in paths}
    missing = [path for path, entry in known.items() if entry is None]
    with _progress(missing) as advance, Threads(THREADS) as pool:

        def step(count: int) -> None:
            pool.check()
            advance(count)

        sha256s = pool.map(lambda path: sha256_of(path, step), missing)
        computed = dict(zip(missing, sha256s, strict=True))
    return [_compare(path, known[path], computed.get(path)) for path in paths]


def forget(paths: Sequence[Path]) -> None:
    """Accept files as they are now: the next digest becomes the one to compare with."""
    for path in paths:
        write_entry("sha256", str(path.resolve()), {})


def remember(path: Path, sha256: str) -> None:
    """Record a digest that was computed elsewhere, for the file as it is now."""
    write_entry(
        "sha256", str(path.resolve()), {**file_state(path), "sha256": sha256, "first": sha256, "first_time": _now()}
    )


def sha256_of(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """sha256 hex of a file; ``advance`` is told how many bytes were read, again and again."""
    total, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
            advance(count)
    return total.hexdigest()


@contextlib.contextmanager
def _progress(paths: Sequence[Path]) -> Iterator[Callable[[int], object]]:
    """A bar on the terminal where hashing takes more than a moment."""
    size = sum(path.stat().st_size for path in paths)
    if size < LARGE:
        yield lambda count: None
        return
    from tqdm import tqdm

    log.info("computing sha256 of %d files (%.1f GB) in %s", len(paths), size / 1e9, paths[0].parent.parent)
    with tqdm(total=size, unit="B", unit_scale=True, desc="sha256 of the weights", disable=None, leave=False) as bar:
        yield bar.update


def _compare(path: Path, entry: dict[str, Any] | None, computed: str | None) -> FileDigest:
    entry = entry or read_entry("sha256", str(path.resolve())) or {}
    sha256 = computed or entry["sha256"]
    hub = _hub_sha256(path)
    first, first_time = entry.get("first"), entry.get("first_time") or _now()
    if computed:
        write_entry(
            "sha256",
            str(path.resolve()),
            {**file_state(path), "sha256": sha256, "first": first or sha256, "first_time": first_time},
        )
    return FileDigest(
        path=path,
        sha256=sha256,
        remembered=computed is None,
        expected=hub or first,
        expected_from="the hub" if hub else f"its first use on {first_time}",
    )


def _unchanged_entry(path: Path) -> dict[str, Any] | None:
    entry = read_entry("sha256", str(path.resolve()))
    if not entry or not isinstance(entry.get("sha256"), str):
        return None
    return entry if all(entry.get(name) == value for name, value in file_state(path).items()) else None


def file_state(path: Path) -> dict[str, int]:
    """What changes when a file's bytes do."""
    stat = path.stat()
    # ctime_ns too: mtime can be put back after a change, and ctime cannot.
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def _hub_sha256(path: Path) -> str | None:
    """Hugging Face's cache names a large file's blob by its sha256 and links to it."""
    target = path.resolve()
    return target.name if path.is_symlink() and _SHA256.fullmatch(target.name) else None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
