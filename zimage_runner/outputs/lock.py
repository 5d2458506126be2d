"""One process per run directory, or other folder that a process writes into.

The kernel's lock (flock) goes away with its process, so a lock left by a dead one needs no cleaning. File systems
without flock fall back on the owner written in the file: host, boot and process (with its start time, because
process numbers are reused).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs import beneath
from zimage_runner.outputs.atomic import remove, write_all
from zimage_runner.outputs.parsed import from_json

LOCK_NAME = ".lock"
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Held from ``acquire`` to ``release`` or to the end of the process, however it ends."""

    def __init__(self, directory: Path, dir_fd: int, name: str = LOCK_NAME) -> None:
        """``dir_fd``: the directory's descriptor, which must stay open; its path is for messages."""
        self.path = directory / name
        self._dir_fd = dir_fd
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock, over a dead owner's if need be. Raises UserError if a living process has it."""
        while self._fd is None:
            fd = beneath.open_file(self._dir_fd, self.path.name, os.O_RDWR | os.O_CREAT)
            try:
                self._lock(fd)
                if self._is_current(fd):
                    os.ftruncate(fd, 0)
                    write_all(fd, json.dumps(_this_process()).encode())
                    self._fd, fd = fd, -1
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self) -> None:
        """Give the lock back and remove its file. Harmless if it is not held."""
        if self._fd is None:
            return
        if self._is_current(self._fd):
            remove(self._dir_fd, self.path.name)
        os.close(self._fd)
        self._fd = None

    def _is_current(self, fd: int) -> bool:
        """Whether the open lock file is still the one under its name (a releasing owner removes it)."""
        try:
            named = os.stat(self.path.name, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(fd), named)

    def _lock(self, fd: int) -> None:
        owner = _parse_owner(os.pread(fd, 4096, 0))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refused(owner) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            if owner and _may_be_alive(owner):
                raise self._refused(owner) from None

    def _refused(self, owner: dict[str, Any]) -> UserError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        return UserError(
            f"{self.path.parent} is in use by {who}: wait for it to end, or work in another directory "
            f"(if that process is dead, remove {self.path})"
        )


def living_owner(data: bytes) -> dict[str, Any] | None:
    """The process that holds a run directory, from the bytes of its lock file; None if that process is gone.

    Takes no lock, not even for an instant: it may be called while a run starts. ``pid`` is of ``host``.
    """
    owner = _parse_owner(data)
    return owner if owner and _may_be_alive(owner) else None


def _parse_owner(data: bytes) -> dict[str, Any]:
    try:
        owner = from_json(data)
        known = {"pid", "host", "boot", "started"} <= owner.keys()
        return owner if known and type(owner["pid"]) is int and isinstance(owner["host"], str) else {}
    except (ValueError, AttributeError):
        return {}


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot_id(), "started": _start_time(pid)}


def _may_be_alive(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return True  # nothing can be known about another machine
    return owner["boot"] == _boot_id() and owner["started"] == _start_time(owner["pid"])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which ``pid`` started; None if there is no such process."""
    try:
        # The command name (field 2) may hold spaces and brackets; field 22 is the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
