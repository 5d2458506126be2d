"""The runner's own cache folder: file digests, resolved hub paths and prepared checkpoints. Never a model folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from zimage_runner.outputs.beneath import NotPlain, unfit_target
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.place import cache_place, own_folder

log = logging.getLogger(__name__)

ROOT_USER = 0
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
"""An access control list that lets others write shows in the group's bits too."""
OPEN_STEP = getattr(os, "O_PATH", os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LINKS = 40
"""On one path: as many as Linux follows."""


def cache_root() -> Path:
    """``$ZIMAGE_RUNNER_CACHE``, else ``$XDG_CACHE_HOME/zimage_runner``, else ``~/.cache/zimage_runner``.

    A user without a home (a container's) has a folder of its own in the one for temporary files.
    """
    return Path(cache_place())


def code_folder(kind: str) -> Path:
    """This user's own folder, in the cache, for what is executed when it is read back; see ``trusted_folder``."""
    return Path(own_folder(kind))


def make_trusted_folder(path: Path) -> bool:
    """Make a folder, readable for this user alone, where there is none. Returns whether it is a ``trusted_folder``."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return trusted_folder(path) and os.access(path, os.W_OK)


def trusted_folder(path: Path) -> bool:
    """Whether nobody but this user and root can have put a file into a folder, or can put another one in its place.

    Code is executed only from such folders. ``path`` may be used by its name afterwards: every folder and link on the
    way belongs to this user or root, and nobody else may write to a folder on the way, so nobody else can rename a part
    of the path or link it elsewhere. A folder that all may write to but with the sticky bit (/tmp) will do on the way:
    there, only the owner of what is inside may rename it. Each step is opened from the one before, without following
    links, and judged as it was opened. Returns False for a folder that does not exist.
    """
    steps = list(reversed(Path(os.path.abspath(path)).parts))
    links = 0
    with contextlib.ExitStack() as opened:
        folder: int | None = None
        while steps:
            step = steps.pop()
            try:
                here = os.open(step, OPEN_STEP, dir_fd=folder)
                opened.callback(os.close, here)
                status = os.fstat(here)
                if stat.S_ISLNK(status.st_mode):
                    links += 1
                    steps += reversed(Path(os.readlink("", dir_fd=here)).parts)
            except OSError:
                return False
            if status.st_uid not in (os.geteuid(), ROOT_USER) or links > MOST_LINKS:
                return False
            if stat.S_ISLNK(status.st_mode):
                continue
            is_safe_on_the_way = bool(status.st_mode & stat.S_ISVTX and steps)
            if not stat.S_ISDIR(status.st_mode) or (status.st_mode & OTHERS_MAY_WRITE and not is_safe_on_the_way):
                return False
            folder = here
    return True


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, which only this user may write to whatever the umask is."""
    for folder in [*reversed(path.parents), path]:
        if not folder.is_dir():
            folder.mkdir(mode=0o755, exist_ok=True)


def is_writable() -> bool:
    """Whether entries can be kept; makes the folder."""
    try:
        make_folders(cache_root())
    except OSError:
        return False
    return os.access(cache_root(), os.W_OK)


def read_entry(kind: str, key: str) -> dict[str, Any] | None:
    """The entry stored under ``key``, or None; a damaged entry counts as none."""
    path = entry_path(kind, key)
    try:
        entry = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring damaged cache entry %s: %s", path, error)
        return None
    return entry if isinstance(entry, dict) and entry.get("key") == key else None


def write_entry(kind: str, key: str, values: dict[str, Any]) -> bool:
    """Store ``values`` under ``key``, atomically. False where the cache cannot be written (it is only a cache)."""
    try:
        write_json(entry_path(kind, key), {"key": key, **values})
    except OSError as error:
        log.warning("cannot write the runner's cache: %s (set ZIMAGE_RUNNER_CACHE to a writable folder)", error)
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the whole new one."""
    make_folders(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o666 & ~umask())  # mkstemp's own mode keeps those out who share the cache
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if (kind := unfit_target(path)) is not None:
            raise NotPlain(str(path), kind)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """This process's umask, read where that changes nothing: setting it would be seen by other threads."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0o077
    return next((int(line[6:], 8) for line in status.splitlines() if line.startswith("Umask:")), 0o077)


def entry_path(kind: str, key: str) -> Path:
    """The file of the entry stored under ``key``."""
    return cache_root() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
