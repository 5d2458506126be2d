"""Shards copied to a store (``s3://bucket/folder``, or whatever fsspec opens).

An object of a store can neither be appended to nor cut back. So shards grow below the run directory and are uploaded
once they are finished; ``shards/uploaded.json`` says which.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from zimage_runner.errors import RunStopped
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.config import READ_BACK, Shards
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.place import PARQUET, SHARDS, TAR
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.store import STATE, parsed, store

log = logging.getLogger(__name__)

_lock = threading.Lock()


class Uploads:
    """What of a run is in a store: shard -> {address, bytes}."""

    def __init__(self, dir_fd: int, entries: dict[str, dict[str, Any]]) -> None:
        self._dir_fd = dir_fd
        self.entries = entries

    @classmethod
    def load(cls, dir_fd: int) -> Self:
        """Of an open run directory. Raises OSError."""
        try:
            with os.fdopen(beneath.open_file(dir_fd, STATE), "rb") as file:
                return cls(dir_fd, parsed(file.read()))
        except FileNotFoundError:
            return cls(dir_fd, {})

    def __contains__(self, shard: str) -> bool:
        return shard in self.entries

    def numbers(self) -> Iterator[int]:
        """Numbers of all shards that were uploaded."""
        for shard in self.entries:
            match = TAR.fullmatch(shard) or PARQUET.fullmatch(shard)
            if match is not None:
                yield int(match[1])

    def add(self, shard: str, address: str, size: int) -> None:
        """Note that a shard is there, safe from power cuts. Raises OSError."""
        self.entries[shard] = {"address": address, "bytes": size}
        self._write()

    def forget(self, shard: str) -> None:
        """Remove a shard from the store, if it is there: it was written anew. Raises OSError, RunStopped."""
        entry = self.entries.pop(shard, None)
        if entry is None:
            return
        for address in (entry["address"], table_of(entry["address"])):
            with store(address) as (files, path):
                if files.exists(path):
                    files.rm_file(path)
        self._write()

    def _write(self) -> None:
        atomic.write_file(self._dir_fd, STATE, readable_json(self.entries), sync=True)
        atomic.sync_dir(self._dir_fd, SHARDS)


def table_of(address: str) -> str:
    """Of the table beside a tar file; of a Parquet file its own address."""
    return re.sub(r"\.tar$", ".parquet", address)


def upload(run_dir: RunDirectory, output: Shards, number: int | None = None) -> None:
    """Copy the finished shard of that number, or all that are not in the store yet. Raises OSError, RunStopped."""
    with _lock, atomic.directory(SHARDS, run_dir.dir_fd) as folder:
        uploads = Uploads.load(run_dir.dir_fd)
        path = run_dir.path.absolute()
        base = f"{str(output.upload).rstrip('/')}/{path.parent.name}/{path.name}"
        for name in sorted(os.listdir(folder)):
            shard = f"{SHARDS}/{name}"
            match = TAR.fullmatch(shard) or PARQUET.fullmatch(shard)
            if match is None or (number is not None and int(match[1]) != number):
                continue
            if shard not in uploads:
                size = _copy(run_dir.path / shard, f"{base}/{name}")
                if name.endswith(".tar"):
                    _copy(run_dir.path / table_of(shard), table_of(f"{base}/{name}"))
                uploads.add(shard, f"{base}/{name}", size)
                log.info("%s was uploaded to %s", shard, f"{base}/{name}")
            if not output.keep:
                for left in {name, table_of(name)}:
                    atomic.remove(folder, left)


def _copy(source: Path, address: str) -> int:
    """Copy a file. Return its size."""
    size = source.stat().st_size
    with store(address) as (files, path):
        if address.partition("://")[0] not in READ_BACK:  # object stores have no folders
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
        files.put_file(str(source), path)
        if (there := files.info(path)["size"]) != size:
            raise RunStopped(f"{address} has {there:,} bytes after the upload, instead of {size:,}: resume the run")
    return size
