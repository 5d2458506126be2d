"""The run directory: its layout, its lock, and the checks that it can take the plan's pictures."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import threading
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Self

from zimage_runner import GB
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.config import Output
from zimage_runner.outputs.ledger import RECORDS
from zimage_runner.outputs.lock import LOCK_NAME, RunLock
from zimage_runner.outputs.place import ITEMS, SHARDS

TOKEN_NAME = ".workers"
"""Proves to workers on other machines that they see the run directory. There only while a run lasts."""
OWN_FILES = (LOCK_NAME, TOKEN_NAME, RECORDS, "summary.json", "run.log", "prompts.jsonl")
OWN_FOLDERS = (ITEMS, SHARDS, ".hydra")
RECORD_BYTES = 16_384
"""Room for a picture's record, its ledger line and the blocks of its two folders."""


class RunDirectory:
    """An open run directory, locked for this process until ``close``.

    Layout: items/<index>_<slug>/seed_<seed>/{image.png,record.json}, records.jsonl, summary.json, run.log, .hydra/;
    with output=shards shards/00000.tar and so on instead of items/
    """

    def __init__(self, path: Path, dir_fd: int, lock: RunLock | None) -> None:
        self.path = path
        self.dir_fd = dir_fd
        """Everything below is written relative to this descriptor; see atomic.py."""
        self._lock = lock
        self._syncing = threading.Lock()
        self._synced: set[str] = set()
        """Folders whose names this process has made safe against power loss, those of single items left out."""

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """A new run. Raises UserError if it cannot be written, is in use, or already holds a run's ledger."""
        directory = cls._open(Path(path), make=True)
        if any(entry == RECORDS for entry in os.listdir(directory.dir_fd)):
            directory.close()
            raise UserError(f"{path} already holds a run: continue it with resume={path}, or choose another directory")
        return directory

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> Self:
        """An earlier run, to be continued. Raises UserError if there is none, or it is in use or not writable."""
        if not Path(path).is_dir():
            raise UserError(f"resume={path} is not a directory: give the run directory that the first run printed")
        return cls._open(Path(path), make=False)

    @classmethod
    def _open(cls, path: Path, *, make: bool) -> Self:
        try:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            dir_fd = atomic.open_dir(path)
            try:
                check_plain(dir_fd)
                lock = RunLock(path, dir_fd)
                lock.acquire()  # creates a file, so it also proves that the directory is writable
                return cls(path, dir_fd, lock)
            except BaseException:
                os.close(dir_fd)
                raise
        except beneath.NotPlain as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except OSError as error:
            raise UserError(
                f"cannot write to {path} ({error.strerror}): set output.root to a directory you can write to"
            ) from None

    def admit_workers(self) -> str:
        """Leave a token by which workers elsewhere know that they see this directory. Return what is in it."""
        token = secrets.token_hex(16)
        self.write_file(TOKEN_NAME, token.encode())
        return token

    def dismiss_workers(self) -> None:
        """Remove the token. Harmless when there is none."""
        with contextlib.suppress(OSError):
            atomic.remove(self.dir_fd, TOKEN_NAME)

    @classmethod
    def join(cls, path: str | os.PathLike[str], token: str) -> Self:
        """The directory of a run that another process has locked, for a worker of that run.

        Raises UserError unless the token is there: the path may be another disk's on this machine.
        """
        unseen = f"{path} of the machine that was started is not to be seen on {socket.gethostname()}"
        remedy = "put output.root on storage that all machines share at the same path, or use executor.writes=driver"
        try:
            dir_fd = atomic.open_dir(Path(path))
        except OSError:
            raise UserError(f"{unseen}: {remedy}") from None
        try:
            with os.fdopen(beneath.open_file(dir_fd, TOKEN_NAME), "rb") as file:
                found = file.read(len(token) + 1)
        except OSError:
            found = b""
        if found != token.encode():
            os.close(dir_fd)
            raise UserError(f"{unseen}: {remedy}")
        return cls(Path(path), dir_fd, None)

    @property
    def records_path(self) -> Path:
        """The ledger: one JSON line for each finished or failed item."""
        return self.path / RECORDS

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def log_path(self) -> Path:
        return self.path / "run.log"

    def free_bytes(self) -> int:
        """Bytes that an ordinary user may still write on this file system."""
        fs = os.fstatvfs(self.dir_fd)
        return fs.f_bavail * fs.f_frsize

    def check_space(self, sizes: Iterable[tuple[int, int]], output: Output) -> None:
        """Raise UserError unless pictures of these (height, width) fit, with ``output.min_free_gb`` to spare."""
        per_pixel = output.estimated_bytes_per_pixel
        needed = sum(h * w * per_pixel + RECORD_BYTES for h, w in sizes) if per_pixel else 0.0
        free = self.free_bytes()
        if free < needed + output.min_free_gb * GB:
            raise UserError(
                f"{self.path} has {free / GB:.2f} GB free, the run needs about {needed / GB:.2f} GB and "
                f"output.min_free_gb={output.min_free_gb:g} to spare: free some space or use another output.root"
            )

    def check_free(self, output: Output) -> None:
        """Raise DiskError when less than ``output.min_free_gb`` is left. Cheap: called for every batch."""
        try:
            free = self.free_bytes()
        except OSError as error:
            raise atomic.disk_error(error, str(self.path)) from error
        if free < output.min_free_gb * GB:
            raise DiskError(
                f"the disk of {self.path} has only {free / GB:.2f} GB free (output.min_free_gb={output.min_free_gb:g})"
            )

    def write_file(self, name: str, data: bytes, *, sync: bool = False) -> None:
        """Write a file of the run directory whole or not at all; ``sync``: safe from power cuts. Raises DiskError."""
        try:
            parent = str(PurePosixPath(name).parent)
            if parent != ".":
                self.make_dirs(parent, sync=sync)
            atomic.write_file(self.dir_fd, name, data, sync=sync)
            if sync:
                atomic.sync_dir(self.dir_fd, parent)
        except OSError as error:
            raise atomic.disk_error(error, str(self.path / name)) from error

    def make_dirs(self, relative: str, *, sync: bool = False) -> None:
        """mkdir -p below the directory; with ``sync`` every name on the way is safe against power loss.

        A folder that is there already may have been made a moment ago, by another thread or by a process that was
        killed: its name is as unsafe as a new one's. Raises NotPlain, OSError.
        """
        beneath.make_dirs(self.dir_fd, relative)
        if not sync:
            return
        above, _, _ = relative.rpartition("/")
        with self._syncing:
            parts = above.split("/") if above else []
            for end in range(1, len(parts) + 1):
                name = "/".join(parts[:end])
                if name not in self._synced:
                    atomic.sync_dir(self.dir_fd, "/".join(parts[: end - 1]) or ".")
                    self._synced.add(name)
        atomic.sync_dir(self.dir_fd, above or ".")

    def sync_name(self) -> None:
        """Make the directory's own name, and those of the folders above it, safe against power loss."""
        for folder in self.path.absolute().parents:
            with contextlib.suppress(OSError), atomic.directory(folder) as above:  # one that others own may refuse
                os.fsync(above)

    def close(self) -> None:
        """Release the lock. Harmless when called twice."""
        if self.dir_fd < 0:
            return
        with contextlib.suppress(OSError):  # the directory may be gone
            if self._lock is not None:
                self._lock.release()
        os.close(self.dir_fd)
        self.dir_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_plain(dir_fd: int) -> None:
    """Raise NotPlain, before anything is done in a run directory, for a link or the like where the runner has a file.

    What it finds later is judged again when it is opened.
    """
    for names, fits in ((OWN_FILES, stat.S_ISREG), (OWN_FOLDERS, stat.S_ISDIR)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
                if not fits(mode):
                    raise beneath.NotPlain(name, beneath.kind_of(mode))


def folder_there(path: str) -> Path:
    """The folder itself where it is there already, else the next one above it that is."""
    folder = Path(os.path.realpath(path))
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def remove_if_empty(directory: Path, there: Path) -> None:
    """Remove a run directory, and what is empty above it below ``there``, when nothing was written into it.

    Hydra makes the run directory before the config is validated. ``there``: the folder that was there before.
    """
    directory, there = (Path(os.path.realpath(path)) for path in (directory, there))  # ".." may lead to the user's own
    for folder in (directory, *directory.parents):
        if there in folder.parents:
            with contextlib.suppress(OSError):
                folder.rmdir()


def checked_item_dir(item_dir: str) -> str:
    """``item_dir`` if it is a plain relative path below the run directory; ValueError otherwise.

    Plans make safe names; this is the last gate before the file system.
    """
    parts = item_dir.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255 for part in parts)
    # Category C holds control characters, NUL, bidi overrides and surrogates.
    if not plain or any(unicodedata.category(c).startswith("C") or c == "\\" for c in item_dir):
        raise ValueError(f"unsafe item directory {item_dir!r}")
    return item_dir
