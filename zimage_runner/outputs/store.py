"""Stores as fsspec opens them (``s3://bucket/folder``), and pictures read back from shards that are only there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zimage_runner.errors import RunStopped, error_text, one_line
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.config import READ_BACK
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import SHARDS

STATE = f"{SHARDS}/uploaded.json"
"""Shard -> address and bytes of each that was uploaded."""


def parsed(data: bytes) -> dict[str, dict[str, Any]]:
    """The entries of a state file; what is none is left out."""
    try:
        found = from_json(data)
    except ValueError:
        return {}
    return {
        shard: entry
        for shard, entry in (found.items() if isinstance(found, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("address"), str) and type(entry.get("bytes")) is int
    }


@contextlib.contextmanager
def store(address: str) -> Iterator[tuple[Any, str]]:
    """A store and the path in it. What goes wrong is said in one line."""
    try:
        import fsspec.core

        files, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
        yield files, path
    except RunStopped:
        raise
    except ImportError as error:
        raise RunStopped(f"{address}: {one_line(str(error), 200)}: pip install 'zimage-runner[s3]'") from None
    except Exception as error:  # each store has its own
        raise RunStopped(f"{address} cannot be reached ({one_line(error_text(error), 300)}): resume the run") from error


def read_back(root: Path, file: str, offset: int, size: int) -> bytes:
    """A piece of a shard (``file``, below ``root``) that is in the store alone. Raises OSError."""
    shard = "/".join(file.split("/")[-2:])
    run = file.removesuffix(shard)
    entry = parsed(Inside(root, run + STATE).read_bytes()).get(shard)
    if entry is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root / file))
    address = entry["address"]
    protocol = address.partition("://")[0]
    if protocol not in READ_BACK:  # a run directory may be somebody else's
        raise OSError(errno.EACCES, f"{shard} was uploaded to {one_line(address, 200)}, which is not read back")
    if offset + size > entry["bytes"]:
        raise OSError(errno.EIO, f"{shard} was cut off")
    try:
        with store(address) as (files, path):
            data = files.cat_file(path, start=offset, end=offset + size)
    except RunStopped as error:
        raise OSError(errno.EIO, str(error)) from error
    if len(data) != size:
        raise OSError(errno.EIO, f"{address} was cut off")
    return data
