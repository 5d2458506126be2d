"""Background writing: pictures are encoded and put on disk while the model draws the next ones.

An item's files are written in this order, each whole or not at all: image.png (or .jpg, .webp), record.json, the
ledger's line. The line is what makes the item done, so killing the process at any instant leaves no item half done.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, error_text
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.config import Fsync, Output
from zimage_runner.outputs.encoders import check_pixels, encode
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import RECORD, Ledger, record_head
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.engines.base import PendingImages


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
class Outcome:
    """What became of an item."""

    request: WriteRequest
    status: str
    """ok or failed: it is in the ledger. bad: not a picture, nothing written; submit it again or call fail()."""
    error: str | None = None
    sha256: str = ""
    size: int = 0
    seconds: float = 0.0
    """Its share of the time between its batch's arrival and the one before: 1 / throughput."""
    since: float = 0.0
    """time.perf_counter() when the device began with its batch: at the arrival of the one before."""
    arrived: float = 0.0
    """time.perf_counter() when its pixels were on the host."""


class ArrivalClock:
    """When a device's last images were on the host. Runs that take turns on one device share a clock. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0

    def arrive(self, start: float) -> tuple[float, float]:
        """Note an arrival. Return when the device began with what arrived, not before ``start``, and the time now."""
        with self._lock:
            since, self._last = max(start, self._last), time.perf_counter()
            return since, self._last


class Writer:
    """Takes batches of pictures, writes them with threads of its own and reports each item's Outcome.

    ``on_done`` is called from the writer's threads, once for each request. When the disk fails, nothing more is written
    and the next submit, fail, flush or close raises DiskError.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        ledger: Ledger,
        output: Output,
        on_done: Callable[[Outcome], None],
        arrivals: ArrivalClock | None = None,
    ) -> None:
        """``arrivals``: the device's clock, where other runs use the device too. No thread starts before ``submit``."""
        self._run_dir = run_dir
        self._ledger = ledger
        self._output = output
        self._on_done = on_done
        self._sync = output.fsync is Fsync.item
        self._fatal: BaseException | None = None
        self._room = threading.Condition()
        self._pending = 0
        self._arrivals = arrivals or ArrivalClock()
        self._start = time.perf_counter()
        self._batches: queue.SimpleQueue[tuple[Sequence[WriteRequest], PendingImages] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(output.writer_threads, thread_name_prefix="writer")
        self._receiver = threading.Thread(target=self._receive_all, name="receiver", daemon=True)

    def start_clock(self) -> None:
        """Count the first picture's seconds from here, or from the device's last arrival if that comes later."""
        self._start = time.perf_counter()

    def submit(self, requests: Sequence[WriteRequest], images: PendingImages) -> None:
        """Queue a batch; image i is that of request i. Blocks while ``max_pending_images`` wait already."""
        self._reserve(len(requests))
        if self._receiver.ident is None:
            self._receiver.start()
        self._batches.put((requests, images))

    def fail(self, request: WriteRequest, error: str) -> None:
        """Queue the record of an item that could not be made. Never blocks, so ``on_done`` may call it."""
        self._check()
        with self._room:
            self._pending += 1
        self._pool.submit(self._guarded, request, self._write_failure, request, error)

    def flush(self) -> None:
        """Wait until every queued request has its Outcome."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0)
        self._check()

    def close(self) -> None:
        """Finish what is queued, then end the threads. Raises DiskError if something could not be written."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0)
        if self._receiver.ident is not None:
            self._batches.put(None)
            self._receiver.join()
        self._pool.shutdown(wait=True)
        self._check()
        if self._output.fsync is Fsync.run:
            try:
                atomic.sync_filesystem(self._run_dir.dir_fd)
            except OSError as error:
                raise atomic.disk_error(error, str(self._run_dir.path)) from error

    def _check(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _reserve(self, count: int) -> None:
        """Wait for room for ``count`` pictures; a batch larger than the limit passes once nothing else waits."""
        limit = max(0, self._output.max_pending_images - count)
        with self._room:
            self._room.wait_for(lambda: self._pending <= limit or self._fatal is not None)
            self._check()
            self._run_dir.check_free(self._output)
            self._pending += count

    def _release(self, count: int = 1) -> None:
        with self._room:
            self._pending -= count
            self._room.notify_all()

    def _receive_all(self) -> None:
        while (batch := self._batches.get()) is not None:
            requests, images = batch
            try:
                pixels = images.wait()
                if len(pixels) != len(requests):
                    raise RuntimeError(f"{len(requests)} pictures were announced, {len(pixels)} came")
            except Exception as error:  # the item boundary: each request hears of it
                for request in requests:
                    self._pool.submit(self._guarded, request, self._report_bad, request, error_text(error))
                continue
            since, arrived = self._arrivals.arrive(self._start)
            seconds = (arrived - since) / len(requests)
            for request, picture in zip(requests, pixels, strict=True):
                times = (seconds, since, arrived)
                self._pool.submit(self._guarded, request, self._write_picture, request, picture, *times)

    def _guarded(self, request: WriteRequest, call: Callable[..., None], *args: Any) -> None:
        """One task of a writer thread: nothing is swallowed, and nothing is written after the first fault."""
        try:
            if self._fatal is None:
                call(*args)
        except OSError as error:
            self._stop(atomic.disk_error(error, str(self._run_dir.path / request.item_dir)))
        except BaseException as error:
            self._stop(error)
        finally:
            self._release()

    def _stop(self, error: BaseException) -> None:
        with self._room:
            self._fatal = self._fatal or error
            self._room.notify_all()

    def _write_picture(
        self, request: WriteRequest, pixels: np.ndarray, seconds: float, since: float, arrived: float
    ) -> None:
        try:
            check_pixels(pixels, allow_constant=self._output.allow_constant)
        except BadPictureError as error:
            self._report_bad(request, error_text(error))
            return
        recipe = {"seed": request.seed, "fingerprint": request.fingerprint, **request.recipe}
        data = encode(pixels, recipe, self._output)
        result = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        }
        self._write_item(
            request, "ok", {"image": self._output.image_name, **result, "seconds": round(seconds, 6)}, data
        )
        if request.output_file is not None:
            _copy_to(Path(request.output_file), data, self._sync)
        done = Outcome(request=request, status="ok", sha256=result["sha256"], size=len(data))
        self._on_done(replace(done, seconds=seconds, since=since, arrived=arrived))

    def _write_failure(self, request: WriteRequest, error: str) -> None:
        self._write_item(request, "failed", {"error": error}, None)
        self._on_done(Outcome(request=request, status="failed", error=error))

    def _report_bad(self, request: WriteRequest, error: str) -> None:
        self._on_done(Outcome(request=request, status="bad", error=error))

    def _write_item(self, request: WriteRequest, status: str, result: dict[str, Any], data: bytes | None) -> None:
        item_dir = checked_item_dir(request.item_dir)
        head = record_head(item_dir, status, request.index, request.seed, request.fingerprint, **result)
        written = {"written": datetime.now(UTC).isoformat(timespec="milliseconds")}
        beneath.make_dirs(self._run_dir.dir_fd, request.item_dir, sync=self._sync)
        with atomic.directory(request.item_dir, self._run_dir.dir_fd) as folder:
            mine = None if data is None else self._output.image_name
            for name in self._earlier_images(request) - {mine}:
                for left in (name, name + atomic.TMP_SUFFIX):
                    atomic.remove(folder, left)
            if data is not None:
                atomic.write_file(folder, self._output.image_name, data, sync=self._sync)
            record = readable_json({**head, **request.recipe, **request.details, **written})
            atomic.write_file(folder, RECORD, record, sync=self._sync)
            if self._sync:
                atomic.sync_dir(folder, ".")
        timings = {"timings": request.details["timings"]} if "timings" in request.details else {}
        self._ledger.append({**head, **timings, **written}, sync=self._sync)

    def _earlier_images(self, request: WriteRequest) -> set[str]:
        """Names under which an earlier attempt, perhaps in another format, may have left the item's picture."""
        entry = self._ledger.entries.get(request.item_dir)
        return {self._output.image_name} | ({entry.image} if entry is not None else set())


def _copy_to(path: Path, data: bytes, sync: bool) -> None:
    """The one-shot request's extra file, replaced as a whole; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_file(path, data, sync=sync)
