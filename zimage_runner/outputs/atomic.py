"""Files that appear under their name only when complete, written relative to an open directory.

Working relative to a directory's descriptor means that a run directory which is deleted meanwhile is noticed
(ENOENT) and never recreated, and one that is moved is followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import PurePosixPath

from zimage_runner.errors import RunStopped

TMP_SUFFIX = ".tmp"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


class DiskError(RunStopped):
    """Results can no longer be written (disk full, directory gone, I/O error). The run stops and can be resumed."""


def disk_error(error: OSError, what: str) -> DiskError:
    """One line for the user from an OSError met while writing ``what``."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"{reason}: free some space"
    elif error.errno in (errno.ENOENT, errno.ESTALE):
        reason = "the run directory has vanished"
    return DiskError(f"cannot write {what} ({reason})")


def write_all(fd: int, data: bytes | memoryview) -> None:
    """write(2) until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_file(dir_fd: int, name: str, data: bytes, *, sync: bool = False) -> None:
    """Write ``name`` (relative to ``dir_fd``) as a whole or not at all; with ``sync``, safe against power loss."""
    tmp = name + TMP_SUFFIX
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666, dir_fd=dir_fd)
    try:
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(tmp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        remove(dir_fd, tmp)
        raise


def link_or_copy(source: str | os.PathLike[str], dir_fd: int, name: str) -> None:
    """Make ``name`` the same file as ``source`` where the file system can, else a copy; whole or not at all."""
    tmp = name + TMP_SUFFIX
    remove(dir_fd, tmp)
    try:
        try:
            os.link(source, tmp, dst_dir_fd=dir_fd)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            target = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)
            with open(source, "rb") as read, os.fdopen(target, "wb") as write:
                shutil.copyfileobj(read, write, 1 << 20)
        os.rename(tmp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    finally:
        # Renaming a link onto the same file does nothing and leaves the temporary name.
        remove(dir_fd, tmp)


def remove(dir_fd: int, name: str) -> None:
    """Unlink ``name`` if it is there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(name, dir_fd=dir_fd)


def open_dir(path: str | os.PathLike[str], dir_fd: int | None = None) -> int:
    """A descriptor of a directory."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)


@contextlib.contextmanager
def directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory, closed at the end."""
    fd = open_dir(path, dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def make_dirs(dir_fd: int, relative: str, *, sync: bool = False) -> None:
    """mkdir -p below ``dir_fd``; with ``sync`` each new name is safe against power loss."""
    path = ""
    for part in PurePosixPath(relative).parts:
        parent = path
        path = f"{path}/{part}" if path else part
        try:
            os.mkdir(path, dir_fd=dir_fd)
        except FileExistsError:
            continue
        if sync:
            sync_dir(dir_fd, parent or ".")


def sync_filesystem(dir_fd: int) -> None:
    """Force everything that was written on the file system of ``dir_fd`` onto the disk (Linux's syncfs)."""
    if ctypes.CDLL(None, use_errno=True).syncfs(dir_fd) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def sync_dir(dir_fd: int, relative: str) -> None:
    """Force a directory's names onto the disk."""
    with directory(relative, dir_fd) as fd:
        os.fsync(fd)
