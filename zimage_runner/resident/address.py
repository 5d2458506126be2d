"""Where the resident process is found: a Unix socket in a folder that only this user can enter.

The folder is opened once and judged by its descriptor; the socket is reached through the descriptor, so neither a
renamed folder nor a long path matters. Both sides ask the system whose process is at the other end (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
import zlib
from collections.abc import Iterator

from zimage_runner.errors import UserError
from zimage_runner.weights.place import own_folder

DEVICES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Environment variables that say which GPUs a process sees: each choice has a resident process of its own."""
MACHINE = ("/proc/sys/kernel/random/boot_id",)
NAMESPACES = ("/proc/self/ns/mnt", "/proc/self/ns/pid", "/proc/self/ns/user")
"""Processes of another container see other files under the same names."""
_CREDENTIALS = struct.Struct("3i")
SUFFIX = ".sock"


class Folder:
    """This user's folder of sockets, open."""

    def __init__(self) -> None:
        """Make it where it is missing. Raises UserError with one line."""
        if not hasattr(socket, "AF_UNIX") or not hasattr(socket, "SO_PEERCRED") or not os.path.isdir("/proc/self/fd"):
            raise UserError("executor=resident needs Linux, with /proc: use executor=inline")
        self.path = own_folder("resident")
        try:
            if not os.path.isdir(self.path):
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                os.mkdir(self.path, 0o700)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(self.path, error.strerror or str(error)) from None
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid():
            raise self._refusal("it belongs to another user")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise self._refusal(f"others may enter it (mode {stat.S_IMODE(status.st_mode):o}, not 700)")

    def _refusal(self, why: str) -> UserError:
        os.close(self.fd)
        return _unusable(self.path, why)

    def place(self, name: str) -> str:
        """A path of ``name`` that is short and leads into this very folder."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def names(self) -> list[str]:
        """The sockets in it."""
        return sorted(name for name in os.listdir(self.fd) if name.endswith(SUFFIX))

    def connect(self, name: str) -> socket.socket | None:
        """A connection to the process that listens there; None where none does. Raises UserError, OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(self.place(name))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise _unusable(self.path, error.strerror or str(error)) from None
        if peer_of(connection)[1] != os.geteuid():
            connection.close()
            raise _unusable(f"{self.path}/{name}", "another user listens there")
        return connection

    def listen(self, name: str) -> socket.socket:
        """Listen there, in place of a process that is gone: hold its ``lock`` before. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self.place(name))
        listener.listen(64)
        return listener

    def lock(self, name: str) -> int | None:
        """A descriptor that holds the lock of the address as long as it is open; None where another process has it."""
        fd = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600, dir_fd=self.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd

    def close(self) -> None:
        """Close the folder; what it gave stays open."""
        os.close(self.fd)


@contextlib.contextmanager
def folder() -> Iterator[Folder]:
    """The folder, while the block runs. Raises UserError."""
    opened = Folder()
    try:
        yield opened
    finally:
        opened.close()


def _unusable(path: object, why: str) -> UserError:
    return UserError(
        f"executor=resident needs a folder of its own for its socket, {path}: {why}: set ZIMAGE_RUNNER_CACHE to a "
        "folder that only you can write to, or use executor=inline"
    )


def name_here() -> str:
    """The name of the socket for this machine, this container and the GPUs that this process sees."""
    parts = [os.environ.get(name, "") for name in DEVICES]
    for file in MACHINE:
        with contextlib.suppress(OSError):
            parts.append(_text(file))
    for link in NAMESPACES:
        with contextlib.suppress(OSError):
            parts.append(os.readlink(link))
    return f"{zlib.crc32(repr(parts).encode()):08x}{SUFFIX}"


def _text(file: str) -> str:
    with open(file, encoding="ascii") as opened:
        return opened.read().strip()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a connection, as the system says."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid
