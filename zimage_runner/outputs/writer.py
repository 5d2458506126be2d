"""Background writing: pictures are encoded and put on disk while the model draws the next ones.

An item's files are written in this order, each whole or not at all: image.png (or .jpg, .webp), record.json,
``output_file``, the ledger's line. The line is what makes the item done, so killing the process at any instant leaves
no item half done.

No thread ends unseen: whatever goes wrong in one stops the run, resumable, and nobody waits for it any longer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, RunStopped, error_text
from zimage_runner.outputs import atomic, beneath, thumbnails
from zimage_runner.outputs.config import Fsync, Output
from zimage_runner.outputs.encoders import check_pixels, encode
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import RECORD, Ledger, record_head
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.engines.base import PendingImages


log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that pictures on their way are waited for after a fault: the GPU may be lost too."""
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
        *,
        thumbnails: bool = False,
    ) -> None:
        """``arrivals``: the device's clock, where other runs use the device too. No thread starts before ``submit``.

        thumbnails: keep a small copy of each picture for the run's report.
        """
        self._run_dir = run_dir
        self._ledger = ledger
        self._output = output
        self._on_done = on_done
        self._thumbnails = thumbnails
        self._sync = output.fsync is Fsync.item
        self._fatal: RunStopped | None = None
        self._room = threading.Condition()
        self._pending = 0
        """Items without an Outcome."""
        self._arrived = 0
        """Of these, the ones that a writer has or can take."""
        self._arrivals = arrivals or ArrivalClock()
        self._start = time.perf_counter()
        self._batches: queue.SimpleQueue[tuple[Sequence[WriteRequest], PendingImages] | None] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[tuple[WriteRequest, Callable[..., None], tuple[Any, ...]] | None]
        self._tasks = queue.SimpleQueue()
        self._receiver: threading.Thread | None = None
        self._writers: list[threading.Thread] = []

    def start_clock(self) -> None:
        """Count the first picture's seconds from here, or from the device's last arrival if that comes later."""
        self._start = time.perf_counter()

    def submit(self, requests: Sequence[WriteRequest], images: PendingImages) -> None:
        """Queue a batch; image i is that of request i. Blocks while ``max_pending_images`` wait already."""
        self._start_threads()
        self._reserve(len(requests))
        self._batches.put((requests, images))

    def fail(self, request: WriteRequest, error: str) -> None:
        """Queue the record of an item that could not be made. Never blocks, so ``on_done`` may call it."""
        self._check()
        self._start_threads()
        with self._room:
            self._pending += 1
        self._put(request, self._write_failure, request, error)

    def flush(self) -> None:
        """Wait until every queued request has its Outcome."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._fatal is not None)
        self._check()

    def write_arrived(self, seconds: float) -> None:
        """Wait, no longer than this, until what has arrived is written; what is still on its way is not waited for."""
        with self._room:
            self._room.wait_for(lambda: self._arrived == 0 or self._fatal is not None, seconds)

    def close(self) -> None:
        """Finish what is queued, then end the threads. Raises RunStopped if something could not be written."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._fatal is not None)
        if self._receiver is not None:
            self._batches.put(None)
            self._receiver.join(None if self._fatal is None else PATIENCE)
        for _ in self._writers:
            self._tasks.put(None)
        for thread in self._writers:
            thread.join()
        self._check()
        if self._output.fsync is Fsync.run:
            try:
                atomic.sync_filesystem(self._run_dir.dir_fd)
            except OSError as error:
                raise atomic.disk_error(error, str(self._run_dir.path)) from error

    def _start_threads(self) -> None:
        """Start what has not been started yet. Fewer writers than asked for will do. Raises RunStopped."""
        if self._receiver is not None and self._writers:
            return
        try:
            if self._receiver is None:
                receiver = threading.Thread(target=self._seen, args=(self._receive_all,), name="receiver", daemon=True)
                receiver.start()
                self._receiver = receiver
            for n in range(self._output.writer_threads):
                writer = threading.Thread(target=self._seen, args=(self._work,), name=f"writer_{n}", daemon=True)
                writer.start()
                self._writers.append(writer)
        except (RuntimeError, MemoryError) as error:
            if not self._writers:
                self._stop(refused_thread(error))
                self._check()
            log.warning(
                "only %d of %d threads write pictures: %s", len(self._writers), self._output.writer_threads, error
            )

    def _seen(self, target: Callable[[], None]) -> None:
        """Life of a thread: what ends it early ends the run."""
        try:
            target()
        except BaseException as error:
            self._stop(error)

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

    def _put(self, request: WriteRequest, call: Callable[..., None], *arguments: Any) -> None:
        with self._room:
            self._arrived += 1
        self._tasks.put((request, call, arguments))

    def _release(self) -> None:
        with self._room:
            self._pending -= 1
            self._arrived -= 1
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
                    self._put(request, self._report_bad, request, error_text(error))
                continue
            since, arrived = self._arrivals.arrive(self._start)
            seconds = (arrived - since) / len(requests)
            for request, picture in zip(requests, pixels, strict=True):
                self._put(request, self._write_picture, request, picture, seconds, since, arrived)
            del batch, images, pixels, picture  # while waiting for the next

    def _work(self) -> None:
        """Life of a writer: task after task. Nothing is written after the first fault."""
        while (task := self._tasks.get()) is not None:
            request, call, arguments = task
            try:
                if self._fatal is None:
                    call(*arguments)
            except OSError as error:
                self._stop(atomic.disk_error(error, str(self._run_dir.path / request.item_dir)))
            except BaseException as error:
                self._stop(error)
            finally:
                self._release()
            del task, request, call, arguments

    def _stop(self, error: BaseException) -> None:
        """The first fault is raised wherever somebody waits; what is no trouble of the disk's is logged as well."""
        stopped = error if isinstance(error, RunStopped) else RunStopped(f"no more pictures can be written ({error!r})")
        with self._room:
            self._fatal = self._fatal or stopped
            self._room.notify_all()
        if stopped is not error:
            stopped.__cause__ = error
            with contextlib.suppress(Exception):  # for want of memory perhaps
                log.error("writing pictures: %s", error_text(error), exc_info=error)

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
        result = {"image": self._output.image_name, **result, "seconds": round(seconds, 6)}
        obstacle = self._write_item(request, "ok", result, data)
        if obstacle is not None:
            self._on_done(Outcome(request=request, status="failed", error=obstacle))
            return
        if self._thumbnails:
            thumbnails.keep(self._run_dir.path / request.item_dir / self._output.image_name, pixels)
        done = Outcome(request=request, status="ok", sha256=result["sha256"], size=len(data))
        self._on_done(replace(done, seconds=seconds, since=since, arrived=arrived))

    def _write_failure(self, request: WriteRequest, error: str) -> None:
        self._write_item(request, "failed", {"error": error}, None)
        self._on_done(Outcome(request=request, status="failed", error=error))

    def _report_bad(self, request: WriteRequest, error: str) -> None:
        self._on_done(Outcome(request=request, status="bad", error=error))

    def _write_item(self, request: WriteRequest, status: str, result: dict[str, Any], data: bytes | None) -> str | None:
        """Write an item's files and its line. Where something else is in its folder's place the item has failed.

        Returns why, then.
        """
        item_dir = checked_item_dir(request.item_dir)
        head = record_head(item_dir, status, request.index, request.seed, request.fingerprint, **result)
        written = {"written": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record = readable_json({**head, **request.recipe, **request.details, **written})
        obstacle = None
        try:
            self._write_files(request, data, record)
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
        self._ledger.append({**head, **timings, **written}, sync=self._sync)
        return obstacle

    def _obstacle(self, item_dir: str, error: OSError) -> str | None:
        """What is wrong with an item's folder alone; None where the whole run is concerned."""
        if isinstance(error, beneath.NotPlain):
            return f"{item_dir}: {error.strerror}"
        if error.errno in OF_THE_ITEM and os.path.lexists(self._run_dir.path / item_dir):
            return f"cannot write {item_dir} ({error.strerror}): put a folder there that you can write to, or remove it"
        if error.errno == errno.ENOTDIR:
            return f"cannot write {item_dir}: a file is in a folder's place: remove it"
        return None

    def _write_files(self, request: WriteRequest, data: bytes | None, record: bytes) -> None:
        """Write the picture, or remove an earlier attempt's, then the record. Raises NotPlain, OSError."""
        self._run_dir.make_dirs(request.item_dir, sync=self._sync)
        with atomic.directory(request.item_dir, self._run_dir.dir_fd) as folder:
            mine = None if data is None else self._output.image_name
            for name in self._earlier_images(request) - {mine}:
                for left in (name, name + atomic.TMP_SUFFIX):
                    atomic.remove(folder, left)
            if data is not None:
                atomic.write_file(folder, self._output.image_name, data, sync=self._sync)
            atomic.write_file(folder, RECORD, record, sync=self._sync)
            if self._sync:
                atomic.sync_dir(folder, ".")

    def _earlier_images(self, request: WriteRequest) -> set[str]:
        """Names under which an earlier attempt, perhaps in another format, may have left the item's picture."""
        entry = self._ledger.entries.get(request.item_dir)
        return {self._output.image_name} | ({entry.image} if entry is not None else set())


def refused_thread(error: Exception) -> RunStopped:
    """Why a run cannot go on that was refused a thread."""
    return RunStopped(
        f"no thread could be started to write pictures ({error}): raise the limit of processes (ulimit -u) or of "
        "memory, or end other programs"
    )


def copy_to(path: Path, data: bytes, *, sync: bool) -> None:
    """The one-shot request's extra file, replaced as a whole; its folder is made if it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_file(path, data, sync=sync)
