"""Files below a directory that somebody else may have filled, opened from its descriptor without following links.

A run directory, a cache or an archive may come from another person, who may have put a link, a FIFO or a device where
the runner expects a file of its own. Everything below such a directory is opened part by part with ``O_NOFOLLOW``, and
what was opened is judged by its descriptor. The directory's own path may contain links: it is the user's choice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO put there between looking and opening must not hold the process up.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITES = os.O_WRONLY | os.O_RDWR
_KEPT_PARENTS = 4096


class NotPlain(OSError):
    """A link, FIFO, socket or device where a plain file or folder belongs; ``strerror`` is one line for the user."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(errno.ELOOP, f"{name} is {kind}: put a plain file or folder there, or remove it")
        self.name = name
        """Where it is, relative to the directory if it was looked for there."""
        self.kind = kind


def kind_of(mode: int) -> str:
    """What a file of this ``st_mode`` is, for a message: a link, a folder ..."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def unfit_target(path: str | os.PathLike[str], dir_fd: int | None = None) -> str | None:
    """What stands at ``path``, if that is no plain file and so must not be replaced; None if it may be written."""
    try:
        mode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
    except (OSError, ValueError):  # nothing is there, or writing will say what is wrong
        return None
    return None if stat.S_ISREG(mode) else kind_of(mode)


def open_dir(dir_fd: int, relative: str) -> int:
    """A descriptor of the folder ``relative`` (``.`` for the directory itself). Raises NotPlain, OSError."""
    fd = os.dup(dir_fd)
    done = ""
    for part in _parts(relative):
        done = f"{done}/{part}" if done else part
        try:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
        except OSError:
            _check_folder(fd, part, done)
            raise
        finally:
            os.close(fd)
        fd = below
    return fd


def open_file(dir_fd: int, relative: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """A descriptor of the plain file ``relative``. Raises NotPlain, OSError.

    To be written in place it must have one name only: a second one (hard link) would be a file of somebody else's.
    """
    with parent(dir_fd, relative) as (folder, name):
        with contextlib.suppress(FileNotFoundError):
            _check_file(os.stat(name, dir_fd=folder, follow_symlinks=False), relative, flags)
        fd = os.open(name, flags | _FILE, mode, dir_fd=folder)
    try:
        _check_file(os.fstat(fd), relative, flags)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def parent(dir_fd: int, relative: str) -> Iterator[tuple[int, str]]:
    """The folder that ``relative`` is in, open while the block runs, and the name in it."""
    _parts(relative)
    folder, _, name = relative.rpartition("/")
    if not folder:
        yield dir_fd, name
        return
    fd = open_dir(dir_fd, folder)
    try:
        yield fd, name
    finally:
        os.close(fd)


def make_dirs(dir_fd: int, relative: str) -> None:
    """mkdir -p below ``dir_fd``. Raises NotPlain, OSError."""
    parts = _parts(relative)
    try:
        os.close(open_dir(dir_fd, relative))
        return
    except FileNotFoundError:
        pass
    for end in range(1, len(parts) + 1):
        with parent(dir_fd, "/".join(parts[:end])) as (folder, name):
            try:
                os.mkdir(name, dir_fd=folder)
            except FileExistsError:
                _check_folder(folder, name, "/".join(parts[:end]))


class Statuses:
    """The status of many files below one directory. Each costs one or two calls of the system, not one a part."""

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        self._folders: set[str] = {""}

    def __call__(self, relative: str) -> os.stat_result:
        """Status of a plain file. Raises NotPlain, OSError."""
        folder = relative.rpartition("/")[0]
        try:
            if not folder or "/." in relative or "//" in relative:
                _parts(relative)
            if folder not in self._folders:
                above = folder.rpartition("/")[0]
                if not above or above not in self._folders:
                    _parts(relative)
                    self._check(folder)
                elif not stat.S_ISDIR(os.stat(folder, dir_fd=self._dir_fd, follow_symlinks=False).st_mode):
                    _check_folder(self._dir_fd, folder, folder)
            status = os.stat(relative, dir_fd=self._dir_fd, follow_symlinks=False)
        except ValueError:  # what no path can hold
            raise NotPlain(repr(relative), "no path below the directory") from None
        if not stat.S_ISREG(status.st_mode):
            raise NotPlain(relative, kind_of(status.st_mode))
        return status

    def _check(self, folder: str) -> None:
        above = folder.rpartition("/")[0]
        if above not in self._folders:
            self._check(above)
            if len(self._folders) > _KEPT_PARENTS:  # a plan has a million folders
                self._folders = {""}
            self._folders.add(above)
        _check_folder(self._dir_fd, folder, folder)


@dataclass(frozen=True, slots=True)
class Inside:
    """A file below a directory, for readers: it is never reached through a link below ``root``."""

    root: Path
    relative: str

    @property
    def path(self) -> Path:
        """For messages and tables; what is read is opened with ``open``."""
        return self.root / self.relative

    def open(self, buffering: int = -1) -> BinaryIO:
        """The file, to be read; ``buffering`` as the builtin has it. Raises NotPlain (with the whole path), OSError."""
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.fdopen(open_file(root, self.relative), "rb", buffering)
        except NotPlain as error:
            raise NotPlain(f"{self.root}/{error.name}", error.kind) from None
        finally:
            os.close(root)

    def read_bytes(self) -> bytes:
        """The whole file. Raises NotPlain, OSError."""
        with self.open() as file:
            return file.read()

    def is_file(self) -> bool:
        """Whether it can be opened; a link below ``root`` is no file."""
        try:
            self.open().close()
        except OSError:
            return False
        return True


def _parts(relative: str) -> list[str]:
    """The names in ``relative``, which must not lead out of the directory."""
    if relative == ".":
        return []
    parts = relative.split("/")
    try:
        fits = not any(part in ("", ".", "..") for part in parts) and b"\0" not in os.fsencode(relative)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise NotPlain(repr(relative), "no path below the directory")
    return parts


def _check_folder(dir_fd: int, name: str, where: str) -> None:
    """Raise NotPlain for what is no folder, and OSError where nothing is."""
    mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
    if not stat.S_ISDIR(mode):
        if stat.S_ISREG(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), where)
        raise NotPlain(where, kind_of(mode))


def _check_file(status: os.stat_result, where: str, flags: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), where)
    if not stat.S_ISREG(status.st_mode):
        raise NotPlain(where, kind_of(status.st_mode))
    if flags & _WRITES and status.st_nlink > 1:
        raise NotPlain(where, "a file with a second name (a hard link), which would change with it")
