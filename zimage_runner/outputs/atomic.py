"""Files that appear under their name only when complete, written relative to an open directory.

Working relative to a directory's descriptor means that a run directory which is deleted meanwhile is noticed
(ENOENT) and never recreated, and one that is moved is followed. No link below that directory is (see beneath.py), and
nothing but a plain file is ever replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from zimage_runner.errors import RunStopped
from zimage_runner.outputs import beneath

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
    """Write ``name``, a path below ``dir_fd``, as a whole or not at all; with ``sync``, safe against power loss.

    It replaces a plain file, or a link that stands at its name, not what that leads to. Raises NotPlain, OSError.
    """
    with beneath.parent(dir_fd, name) as (folder, base):
        write_as(folder, base, base + TMP_SUFFIX, data, sync=sync)


def replace_file(path: Path, data: bytes, *, sync: bool = False, changed_ns: int | None = None) -> None:
    """Write a file among a user's own ones, whole or not at all. Raises NotPlain unless a plain file or none is there.

    Its temporary name is the runner's own, so that no file of the user's is taken for a leftover. ``changed_ns``: the
    time of its last change in nanoseconds, instead of now.
    """
    with naming(path), directory(path.parent) as folder:
        if (kind := beneath.unfit_target(path.name, folder)) is not None:
            raise beneath.NotPlain(str(path), kind)
        write_as(folder, path.name, own_temporary(path.name), data, sync=sync, changed_ns=changed_ns)
        if sync:
            os.fsync(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file was to be written: within an open folder it has a temporary name, or none."""
    try:
        yield
    except beneath.NotPlain:  # says it
        raise
    except OSError as error:
        error.filename = str(path)
        raise


def own_temporary(name: str) -> str:
    """What ``name`` is called in a user's folder until it is complete: never the name of a file of the user's."""
    return f".zimage_runner.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{TMP_SUFFIX}"


def is_own_temporary(name: str) -> bool:
    """Whether ``own_temporary`` gave this name."""
    return re.fullmatch(rf"\.zimage_runner\.[0-9a-f]{{16}}{re.escape(TMP_SUFFIX)}", name) is not None


def write_as(
    dir_fd: int, name: str, tmp: str, data: bytes, *, sync: bool = False, changed_ns: int | None = None
) -> None:
    """``write_file`` in the open folder itself, with the name that the file has until it is complete."""
    if (kind := beneath.unfit_target(name, dir_fd)) not in (None, "a link"):
        raise beneath.NotPlain(name, kind or "")
    fd = create(dir_fd, tmp)
    try:
        try:
            write_all(fd, data)
            if changed_ns is not None:
                os.utime(fd, ns=(changed_ns, changed_ns))
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(tmp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        remove(dir_fd, tmp)
        raise


def create(dir_fd: int, name: str) -> int:
    """A descriptor of a new file; what a killed process left under this name is removed, not written into."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(name, flags, 0o666, dir_fd=dir_fd)
    except FileExistsError:
        remove(dir_fd, name)
        return os.open(name, flags, 0o666, dir_fd=dir_fd)


def link_or_copy(
    source: int, source_name: str, dir_fd: int, name: str, *, tmp: str | None = None, sync: bool = False
) -> None:
    """Make ``name`` the same file as ``source_name`` of the folder ``source`` where the file system can, else a copy.

    Whole or not at all; links are not followed. With ``sync`` its bytes are safe against power loss: those of an
    earlier run may not be. Raises NotPlain, OSError.
    """
    tmp = tmp or name + TMP_SUFFIX
    with os.fdopen(beneath.open_file(source, source_name), "rb") as read:
        remove(dir_fd, tmp)
        try:
            try:
                os.link(source_name, tmp, src_dir_fd=source, dst_dir_fd=dir_fd, follow_symlinks=False)
                if not os.path.samestat(os.fstat(read.fileno()), os.stat(tmp, dir_fd=dir_fd, follow_symlinks=False)):
                    raise beneath.NotPlain(source_name, "another file than a moment ago")
                if sync:
                    os.fsync(read.fileno())
            except OSError as error:
                if isinstance(error, beneath.NotPlain) or error.errno not in _NO_LINK:
                    raise
                with os.fdopen(create(dir_fd, tmp), "wb") as write:
                    shutil.copyfileobj(read, write, 1 << 20)
                    if sync:
                        write.flush()
                        os.fsync(write.fileno())
            os.rename(tmp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        finally:
            # Renaming a link onto the same file does nothing and leaves the temporary name.
            remove(dir_fd, tmp)


def remove(dir_fd: int, name: str) -> None:
    """Unlink ``name`` if it is there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(name, dir_fd=dir_fd)


def open_dir(path: str | os.PathLike[str], dir_fd: int | None = None) -> int:
    """A descriptor of a directory; below ``dir_fd`` no link is followed."""
    if dir_fd is not None:
        return beneath.open_dir(dir_fd, os.fspath(path))
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextlib.contextmanager
def directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory, closed at the end."""
    fd = open_dir(path, dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_filesystem(dir_fd: int) -> None:
    """Force everything that was written on the file system of ``dir_fd`` onto the disk (Linux's syncfs)."""
    if ctypes.CDLL(None, use_errno=True).syncfs(dir_fd) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def sync_dir(dir_fd: int, relative: str) -> None:
    """Force a directory's names onto the disk."""
    with directory(relative, dir_fd) as fd:
        os.fsync(fd)
