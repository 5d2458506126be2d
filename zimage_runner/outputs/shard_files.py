"""Pictures and records put into shards by whoever has the pixels: one shard at a time for each process.

The order is that of a run of folders: the sample is on disk before the ledger has its line. A shard that is full is
finished (end mark and table, or the Parquet file) and uploaded by a thread of its own, once the ledger has all its
lines.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zimage_runner.errors import RunStopped
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import IMAGE_STEM, Layout, Shards
from zimage_runner.outputs.item_files import Filed, ItemFiles, WriteRequest, copy_to
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.ledger import Ledger, record_head
from zimage_runner.outputs.place import RECORD, SHARDS, fields_of
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir
from zimage_runner.outputs.shard_finish import Kept, finish_tar, rewrite
from zimage_runner.outputs.shard_settle import Stage, next_number, settle
from zimage_runner.outputs.shard_tar import OpenTar
from zimage_runner.outputs.uploads import upload

log = logging.getLogger(__name__)

OF_A_SAMPLE = 8192
"""Bytes of headers and padding, more than there are."""


@dataclass
class _Full:
    """A shard that takes no more samples; ``waiting`` of them are not in the ledger yet."""

    waiting: int = 0
    items: list[str] = field(default_factory=list)


class ShardFiles(ItemFiles):
    """Writes items into shards below an open run directory. May be used from any thread."""

    def __init__(self, run_dir: RunDirectory, output: Shards, *, thumbnails: bool = False) -> None:
        super().__init__(run_dir, output, thumbnails=thumbnails)
        self._bounds = output
        self._lock = threading.Lock()
        self._tar: OpenTar | None = None
        self._shards: dict[str, _Full] = {}
        """By name, until finished: the open one too."""
        self._ledger: Ledger | None = None
        """Where this process finishes shards. A worker does not: the process with the ledger does."""
        self._finisher: ThreadPoolExecutor | None = None
        self._finishing: list[Future[None]] = []

    def begin(self, ledger: Ledger, damaged: Mapping[str, str]) -> None:
        self._run_dir.make_dirs(SHARDS, sync=self._sync)
        left = settle(self._run_dir, ledger, self._bounds, Stage.begins, damaged)
        self._ledger = ledger
        if left is not None:
            self._tar = left.open(self._run_dir.dir_fd)
            self._shards[self._tar.name] = _Full(items=[kept.item for kept in left.samples])

    def end(self, ledger: Ledger, *, complete: bool) -> None:
        if self._finisher is not None:
            self._finisher.shutdown()
        self._raise_what_failed()
        with self._lock:
            if self._tar is not None:
                self._tar.close()
                self._tar = None
        settle(self._run_dir, ledger, self._bounds, Stage.complete if complete else Stage.pauses)
        if complete and self._bounds.upload is not None:
            upload(self._run_dir, self._bounds)

    def _file(self, request: WriteRequest, result: dict[str, Any], data: bytes | None, earlier: Set[str]) -> Filed:
        item_dir = checked_item_dir(request.item_dir)
        status = "failed" if data is None else "ok"
        head = record_head(item_dir, status, request.index, request.seed, request.fingerprint)
        written = {"written": datetime.now(UTC).isoformat(timespec="milliseconds")}
        timings = {"timings": request.details["timings"]} if "timings" in request.details else {}
        self._remove_files(item_dir, earlier)
        if data is None:
            return Filed(line={**head, **result, **timings, **written})
        record = {**head, **result, **request.recipe, **request.details, **written}
        place = self.add(data, record)
        if request.output_file is not None:
            copy_to(Path(request.output_file), data, sync=self._sync)
        first = {name: result.pop(name) for name in ("image", "sha256", "bytes")}
        return Filed(line={**head, **first, **place, **result, **timings, **written})

    def add(self, picture: bytes, record: dict[str, Any]) -> dict[str, Any]:
        """Add a picture with its record. Return what the ledger's line says of the place. Raises OSError."""
        text = compact_json(record).encode()
        size = len(picture) + 2 * len(text) + OF_A_SAMPLE
        suffix = str(record["image"]).removeprefix(IMAGE_STEM)
        with self._lock:
            tar = self._with_room(size)
            key, place = tar.append(picture, suffix, record, text)
            if self._ledger is not None:
                shard = self._shards[tar.name]
                shard.waiting += 1
                shard.items.append(record["item"])
            fd = os.dup(tar.fd) if self._sync else -1
        if fd >= 0:  # outside of the lock: what several threads wrote is forced to disk together
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        return fields_of(place, key)

    def recorded(self, filed: Filed) -> None:
        name = filed.line.get("shard")
        self._raise_what_failed()
        with self._lock:
            shard = self._shards.get(name) if isinstance(name, str) else None
            if shard is None:
                return
            shard.waiting -= 1
            is_open = self._tar is not None and self._tar.name == name
            if is_open or shard.waiting:
                return
        self._finish_later(str(name))

    def _with_room(self, size: int) -> OpenTar:
        tar = self._tar
        if tar is not None and tar.has_room(size, self._bounds.shard_pictures, self._bounds.shard_mb):
            return tar
        if tar is not None:
            tar.close()
            self._tar = None
            if not self._shards[tar.name].waiting:
                self._finish_later(tar.name)
        self._run_dir.make_dirs(SHARDS, sync=self._sync)
        number = next_number(self._run_dir.dir_fd)
        while self._tar is None:
            try:
                self._tar = OpenTar.create(self._run_dir.dir_fd, number)
            except FileExistsError:  # another worker has it
                number += 1
        self._shards[self._tar.name] = _Full()
        if self._sync:
            atomic.sync_dir(self._run_dir.dir_fd, SHARDS)
        return self._tar

    def _finish_later(self, name: str) -> None:
        shard = self._shards.pop(name)
        if self._ledger is None:  # a worker's
            return
        if self._finisher is None:
            self._finisher = ThreadPoolExecutor(1, thread_name_prefix="shards")
        try:
            self._finishing.append(self._finisher.submit(self._finish, name, shard.items))
        except RuntimeError:  # no thread is to be had: it is finished when the run ends
            return

    def _finish(self, name: str, items: list[str]) -> None:
        ledger = self._ledger
        assert ledger is not None
        samples = [Kept(item, entry) for item in items if (entry := ledger.entries[item]).place is not None]
        samples = [kept for kept in samples if kept.place.shard == name]
        if len(samples) != len(items):
            return  # an item was drawn again meanwhile: the shard is settled when the run ends
        number = int(Path(name).stem)
        if self._bounds.layout is Layout.parquet:
            rewrite(self._run_dir.dir_fd, ledger, number, samples, as_parquet=True)
        else:
            finish_tar(self._run_dir.dir_fd, number, samples, sync=self._sync)
        if self._bounds.upload is not None:
            try:
                upload(self._run_dir, self._bounds, number)
            except RunStopped as error:  # the pictures are here: it is tried again when the run ends
                log.warning("%s", error)

    def _raise_what_failed(self) -> None:
        for future in [future for future in self._finishing if future.done()]:
            self._finishing.remove(future)
            future.result()

    def _remove_files(self, item_dir: str, earlier: Set[str]) -> None:
        """What an earlier process wrote into the item's own folder, before the run had shards."""
        if earlier and os.path.lexists(self._run_dir.path / item_dir):
            with atomic.directory(item_dir, self._run_dir.dir_fd) as folder:
                for name in (*earlier, RECORD):
                    atomic.remove(folder, name)
