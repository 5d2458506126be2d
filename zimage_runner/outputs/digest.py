"""Whether a file is still the one that pictures were drawn from."""

from __future__ import annotations

import functools
import hashlib
import os


def sha256_of(path: str) -> str:
    """Digest of a file, in hex; read once for as long as it stays as it is. Raises OSError."""
    found = os.stat(path)
    return _sha256_of(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1024)  # many pictures start from one; each job of a multirun reads the same file
def _sha256_of(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
