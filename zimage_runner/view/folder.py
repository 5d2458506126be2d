"""The folder that the gallery shows: its files are reached without following a link, so nothing outside is served."""

from __future__ import annotations

import errno
import os
from typing import Self

from zimage_runner.outputs import beneath


class Folder:
    """An open directory. Names are relative paths with ``/`` between their parts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, name: str) -> int:
        """A descriptor of the plain file ``name``. Raises OSError for links on the way, and for what is no file."""
        return beneath.open_file(self._fd, name)

    def open_directory(self, name: str) -> int:
        """A descriptor of the directory ``name``; an empty name is the folder itself. Raises OSError."""
        return beneath.open_dir(self._fd, name or ".")

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of ``name``. Raises OSError, also when it has more than ``limit``."""
        with os.fdopen(self.open(name), "rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
            return file.read(limit)

    def stat(self, name: str) -> os.stat_result | None:
        """What ``name`` is, a link not followed; None where there is none."""
        try:
            with beneath.parent(self._fd, name) as (folder, last):
                return os.stat(last, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None

    def close(self) -> None:
        """Harmless when called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
