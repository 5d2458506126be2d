"""Background writing: pictures are encoded and put on disk while the model draws the next ones.

An item's files are written in this order, each whole or not at all: image.png, record.json, the ledger's line. The
line is what makes the item done, so killing the process at any instant leaves no item half done.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, error_text
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.config import Fsync, Output
from zimage_runner.outputs.encoders import check_pixels, encode_png
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import IMAGE, RECORD, Ledger
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.engines.base import PendingImages


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureJob:
    """One item on its way to disk."""

    item_dir: str
    """items/<index>_<slug>/seed_<seed>, relative to the run directory; also the item's name in the ledger."""
    index: int
    """Position of the prompt in the run."""
    seed: int
    fingerprint: str
    recipe: dict[str, Any]
    """All that decides the picture (prompt, params, model, numerics, versions ..): goes into record and PNG.
    Nothing that differs between two runs of the same item belongs here."""
    details: dict[str, Any] = field(default_factory=dict)
    """What happened this time (timings, GPU memory, attempts, host ..): goes into the record alone."""
    output_file: str | None = None
    """Also put the picture here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a job."""

    job: PictureJob
    status: str
    """ok or failed: it is in the ledger. bad: not a picture, nothing written; submit it again or call fail()."""
    error: str | None = None
    sha256: str = ""
    size: int = 0
    seconds: float = 0.0
    """Its share of the time between its batch's arrival and the one before: 1 / throughput."""
    arrived: float = 0.0
    """time.perf_counter() when its pixels were on the host."""


class Writer:
    """Takes batches of pictures, writes them with threads of its own and reports each item's Outcome.

    ``on_done`` is called from the writer's threads, once for each job. When the disk fails, nothing more is written
    and the next submit, fail, flush or close raises DiskError.
    """

    def __init__(
        self, run_dir: RunDirectory, ledger: Ledger, output: Output, on_done: Callable[[Outcome], None]
    ) -> None:
        self._run_dir = run_dir
        self._ledger = ledger
        self._output = output
        self._on_done = on_done
        self._sync = output.fsync is Fsync.item
        self._fatal: BaseException | None = None
        self._room = threading.Condition()
        self._pending = 0
        self._last_arrival = time.perf_counter()
        self._arrived = False
        self._batches: queue.SimpleQueue[tuple[Sequence[PictureJob], PendingImages] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(output.writer_threads, thread_name_prefix="writer")
        self._receiver = threading.Thread(target=self._receive_all, name="receiver", daemon=True)
        self._receiver.start()

    def start_clock(self) -> None:
        """The first picture's seconds count from here."""
        self._last_arrival = time.perf_counter()

    def not_before(self, instant: float) -> None:
        """The device was busy with another run until then: the first picture's seconds count from there."""
        with self._room:
            if not self._arrived:
                self._last_arrival = max(self._last_arrival, instant)

    def submit(self, jobs: Sequence[PictureJob], images: PendingImages) -> None:
        """Queue a batch, picture i of ``images`` being job i's. Blocks while ``max_pending_images`` wait already."""
        self._reserve(len(jobs))
        self._batches.put((jobs, images))

    def fail(self, job: PictureJob, error: str) -> None:
        """Queue the record of an item that could not be made. Never blocks, so ``on_done`` may call it."""
        self._check()
        with self._room:
            self._pending += 1
        self._pool.submit(self._guarded, job, self._write_failure, job, error)

    def flush(self) -> None:
        """Wait until every queued job has its Outcome."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0)
        self._check()

    def close(self) -> None:
        """Finish what is queued, then end the threads. Raises DiskError if something could not be written."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0)
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
            jobs, images = batch
            try:
                pixels = images.wait()
                if len(pixels) != len(jobs):
                    raise RuntimeError(f"{len(jobs)} pictures were announced, {len(pixels)} came")
            except Exception as error:  # the item boundary: each job hears of it
                for job in jobs:
                    self._pool.submit(self._guarded, job, self._report_bad, job, error_text(error))
                continue
            with self._room:
                self._arrived, arrived = True, time.perf_counter()
                seconds, self._last_arrival = (arrived - self._last_arrival) / len(jobs), arrived
            for job, picture in zip(jobs, pixels, strict=True):
                self._pool.submit(self._guarded, job, self._write_picture, job, picture, seconds, arrived)

    def _guarded(self, job: PictureJob, call: Callable[..., None], *args: Any) -> None:
        """One task of a writer thread: nothing is swallowed, and nothing is written after the first fault."""
        try:
            if self._fatal is None:
                call(*args)
        except OSError as error:
            self._stop(atomic.disk_error(error, str(self._run_dir.path / job.item_dir)))
        except BaseException as error:
            self._stop(error)
        finally:
            self._release()

    def _stop(self, error: BaseException) -> None:
        with self._room:
            self._fatal = self._fatal or error
            self._room.notify_all()

    def _write_picture(self, job: PictureJob, pixels: np.ndarray, seconds: float, arrived: float) -> None:
        try:
            check_pixels(pixels, allow_constant=self._output.allow_constant)
        except BadPictureError as error:
            self._report_bad(job, error_text(error))
            return
        recipe = {"seed": job.seed, "fingerprint": job.fingerprint, **job.recipe}
        png = encode_png(pixels, recipe, self._output)
        result = {
            "sha256": hashlib.sha256(png).hexdigest(),
            "bytes": len(png),
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        }
        self._write_item(job, "ok", {"image": IMAGE, **result, "seconds": round(seconds, 6)}, png)
        if job.output_file is not None:
            _copy_to(Path(job.output_file), png, self._sync)
        self._on_done(
            Outcome(job=job, status="ok", sha256=result["sha256"], size=len(png), seconds=seconds, arrived=arrived)
        )

    def _write_failure(self, job: PictureJob, error: str) -> None:
        self._write_item(job, "failed", {"error": error}, None)
        self._on_done(Outcome(job=job, status="failed", error=error))

    def _report_bad(self, job: PictureJob, error: str) -> None:
        self._on_done(Outcome(job=job, status="bad", error=error))

    def _write_item(self, job: PictureJob, status: str, result: dict[str, Any], png: bytes | None) -> None:
        head = {
            "item": checked_item_dir(job.item_dir),
            "status": status,
            "index": job.index,
            "seed": job.seed,
            "fingerprint": job.fingerprint,
            **result,
        }
        written = {"written": datetime.now(UTC).isoformat(timespec="milliseconds")}
        beneath.make_dirs(self._run_dir.dir_fd, job.item_dir, sync=self._sync)
        with atomic.directory(job.item_dir, self._run_dir.dir_fd) as folder:
            if png is None:
                for name in (IMAGE, IMAGE + atomic.TMP_SUFFIX):  # of an earlier attempt
                    atomic.remove(folder, name)
            else:
                atomic.write_file(folder, IMAGE, png, sync=self._sync)
            record = readable_json({**head, **job.recipe, **job.details, **written})
            atomic.write_file(folder, RECORD, record, sync=self._sync)
            if self._sync:
                atomic.sync_dir(folder, ".")
        timings = {"timings": job.details["timings"]} if "timings" in job.details else {}
        self._ledger.append({**head, **timings, **written}, sync=self._sync)


def _copy_to(path: Path, png: bytes, sync: bool) -> None:
    """The one-shot job's extra file, replaced as a whole; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_file(path, png, sync=sync)
