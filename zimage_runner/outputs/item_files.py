"""An item's own files: its picture and its record, put on disk by whoever has the pixels.

That is a thread of the writer or, on storage that a cluster shares, the worker that drew it. The ledger's line, which
makes the item done, is appended by the process that has the ledger.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.outputs import atomic, beneath, thumbnails
from zimage_runner.outputs.config import Fsync, Output, Shards
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import Ledger, record_head
from zimage_runner.outputs.place import RECORD, SHARDS
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir

if TYPE_CHECKING:
    import numpy as np

OF_THE_ITEM = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
"""What writing fails with where something else stands in the place of an item's folder, or it is closed to us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteRequest:
    """One item on its way to disk."""

    item_dir: str
    """items/<index>_<slug>/seed_<seed>, relative to the run directory; also the item's name in the ledger."""
    index: int
    """Position of the prompt in the run."""
    seed: int
    fingerprint: str
    recipe: dict[str, Any]
    """All that decides the picture (prompt, params, model, numerics, versions ..): goes into record and picture.
    Nothing that differs between two runs of the same item belongs here."""
    details: dict[str, Any] = field(default_factory=dict)
    """What happened this time (timings, GPU memory, attempts, host ..): goes into the record alone."""
    output_file: str | None = None
    """Also put the picture here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filed:
    """What has become of an item's files, and the line of the ledger that is still to be appended."""

    line: dict[str, Any]
    error: str | None = None
    """Why the item has failed; None where its picture is there."""

    @property
    def status(self) -> str:
        """ok or failed."""
        return "ok" if self.error is None else "failed"


class ItemFiles:
    """Writes items' files below an open run directory. May be used from any thread.

    What an item is put into is up to ``_file``: here files in a folder of its own.
    """

    def __init__(self, run_dir: RunDirectory, output: Output, *, thumbnails: bool = False) -> None:
        """thumbnails: keep a small copy of each picture for the run's report."""
        self._run_dir = run_dir
        self._output = output
        self._thumbnails = thumbnails
        self._sync = output.fsync is Fsync.item

    def picture(
        self, request: WriteRequest, pixels: np.ndarray, seconds: float, earlier: Set[str] = frozenset()
    ) -> Filed:
        """Write a picture (uint8 [height, width, 3]) and its record.

        ``earlier``: file names of the item's earlier pictures, which are removed. Raises BadPictureError, OSError.
        """
        from zimage_runner.outputs import encoders

        encoders.check_pixels(pixels, allow_constant=self._output.allow_constant)
        recipe = {"seed": request.seed, "fingerprint": request.fingerprint, **request.recipe}
        data = encoders.encode(pixels, recipe, self._output)
        result = {
            "image": self._output.image_name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "seconds": round(seconds, 6),
        }
        filed = self._file(request, result, data, earlier)
        if filed.error is None and self._thumbnails:
            thumbnails.keep(self._run_dir.path / request.item_dir / self._output.image_name, pixels)
        return filed

    def failure(self, request: WriteRequest, error: str, earlier: Set[str] = frozenset()) -> Filed:
        """Write the record of an item that has no picture. Raises OSError."""
        filed = self._file(request, {"error": error}, None, earlier)
        return Filed(line=filed.line, error=filed.error or error)

    def begin(self, ledger: Ledger, damaged: Mapping[str, str]) -> None:
        """Make ready to go on with a run; ``damaged``: pictures that are not what was written. Raises OSError.

        Only a process that has the run's lock may do this, and what follows.
        """
        if os.path.lexists(self._run_dir.path / SHARDS):  # earlier processes wrote some
            from zimage_runner.outputs import shard_settle

            shard_settle.settle(self._run_dir, ledger, self._output, shard_settle.Stage.pauses, damaged)

    def recorded(self, filed: Filed) -> None:
        """Note that the ledger has the line of what was written. Raises OSError."""

    def end(self, ledger: Ledger, *, complete: bool) -> None:
        """Finish what was left open; ``complete``: the run has all its pictures. Raises OSError, RunStopped."""

    def _file(self, request: WriteRequest, result: dict[str, Any], data: bytes | None, earlier: Set[str]) -> Filed:
        """Write the files. Where something else is in their folder's place the item has failed."""
        item_dir = checked_item_dir(request.item_dir)
        status = "failed" if data is None else "ok"
        head = record_head(item_dir, status, request.index, request.seed, request.fingerprint, **result)
        written = {"written": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record = readable_json({**head, **request.recipe, **request.details, **written})
        obstacle = None
        try:
            self._write(request, data, record, earlier)
        except OSError as error:
            obstacle = self._obstacle(request.item_dir, error)
            if obstacle is None:
                raise
            head = {name: value for name, value in head.items() if name not in result}
            head |= {"status": "failed", "error": obstacle}
        else:
            if data is not None and request.output_file is not None:
                copy_to(Path(request.output_file), data, sync=self._sync)
        timings = {"timings": request.details["timings"]} if "timings" in request.details else {}
        return Filed(line={**head, **timings, **written}, error=obstacle)

    def _obstacle(self, item_dir: str, error: OSError) -> str | None:
        """What is wrong with an item's folder alone; None where the whole run is concerned."""
        if isinstance(error, beneath.NotPlain):
            return f"{item_dir}: {error.strerror}"
        if error.errno in OF_THE_ITEM and os.path.lexists(self._run_dir.path / item_dir):
            return f"cannot write {item_dir} ({error.strerror}): put a folder there that you can write to, or remove it"
        if error.errno == errno.ENOTDIR:
            return f"cannot write {item_dir}: a file is in a folder's place: remove it"
        return None

    def _write(self, request: WriteRequest, data: bytes | None, record: bytes, earlier: Set[str]) -> None:
        """Write the picture, or remove an earlier attempt's, then the record. Raises NotPlain, OSError."""
        self._run_dir.make_dirs(request.item_dir, sync=self._sync)
        mine = self._output.image_name
        with atomic.directory(request.item_dir, self._run_dir.dir_fd) as folder:
            for name in ({mine} | earlier) - ({mine} if data is not None else set()):
                for left in (name, name + atomic.TMP_SUFFIX):
                    atomic.remove(folder, left)
            if data is not None:
                atomic.write_file(folder, mine, data, sync=self._sync)
            atomic.write_file(folder, RECORD, record, sync=self._sync)
            if self._sync:
                atomic.sync_dir(folder, ".")


def files_of(run_dir: RunDirectory, output: Output, *, thumbnails: bool) -> ItemFiles:
    """What writes items as ``output`` says."""
    if isinstance(output, Shards):
        from zimage_runner.outputs.shard_files import ShardFiles  # others need none of it

        return ShardFiles(run_dir, output, thumbnails=thumbnails)
    return ItemFiles(run_dir, output, thumbnails=thumbnails)


def copy_to(path: Path, data: bytes, *, sync: bool) -> None:
    """The one-shot request's extra file, replaced as a whole; its folder is made if it is missing. Raises DiskError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_file(path, data, sync=sync)
    except OSError as error:
        raise atomic.DiskError(
            f"cannot write output_file={path} ({error.strerror}): resume with another output_file=FILE"
        ) from error
