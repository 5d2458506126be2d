"""Background writing: pictures are encoded and put on disk while the model draws the next ones.

An item's files are written in this order, each whole or not at all: image.png (or .jpg, .webp), record.json (with
output=shards both at once, as a sample of a shard), ``output_file``, the ledger's line. The line is what makes the item
done, so killing the process at any instant leaves no item half done.

No thread ends unseen: whatever goes wrong in one stops the run, resumable, and nobody waits for it any longer.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, RunStopped, error_text
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import Fsync, Output
from zimage_runner.outputs.item_files import Filed, WriteRequest, files_of
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.engines.base import PendingImages


log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that pictures on their way are waited for after a fault: the GPU may be lost too."""
LOOK_SECONDS = 1.0
"""Between looks at whether the threads live, while they are waited for."""
RECORDS_AHEAD = 4096
"""Lines of items that workers have written which may wait: they are small, and appended together."""


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
        self.files = files_of(run_dir, output, thumbnails=thumbnails)
        """What the pictures are put into."""
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
        self._written: queue.SimpleQueue[tuple[Sequence[WriteRequest], Sequence[Filed | str]] | None]
        self._written = queue.SimpleQueue()
        self._recorder: threading.Thread | None = None

    def start_clock(self) -> None:
        """Count the first picture's seconds from here, or from the device's last arrival if that comes later."""
        self._start = time.perf_counter()

    def begin(self, damaged: Mapping[str, str]) -> None:
        """Make the files ready to go on, where earlier processes wrote some. Raises DiskError.

        damaged: finished pictures that are no longer what was written, and why.
        """
        with self._disk():
            self.files.begin(self._ledger, damaged)

    def settle(self, *, complete: bool) -> None:
        """Finish what is left open, once all is written; ``complete``: no picture is missing. Raises RunStopped."""
        with self._disk():
            self.files.end(self._ledger, complete=complete)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise atomic.disk_error(error, str(self._run_dir.path)) from error

    def submit(self, requests: Sequence[WriteRequest], images: PendingImages) -> None:
        """Queue a batch; image i is that of request i. Blocks while ``max_pending_images`` wait already."""
        self._start_threads()
        self._reserve(len(requests), self._output.max_pending_images)
        try:
            self._batches.put((requests, images))
        except BaseException as error:  # counted and not queued, it would be waited for for ever
            self._stop(error)
            raise

    def fail(self, request: WriteRequest, error: str) -> None:
        """Queue the record of an item that could not be made. Never blocks, so ``on_done`` may call it."""
        self._check()
        self._start_threads()
        with self._room:
            self._pending += 1
        try:
            self._put(request, self._write_failure, request, error)
        except BaseException as fault:
            self._stop(fault)
            raise

    def record(self, requests: Sequence[WriteRequest], written: Sequence[Filed | str]) -> None:
        """Queue the lines of items that workers have written; in place of a line, why there is no picture.

        Blocks while ``RECORDS_AHEAD`` wait already.
        """
        self._start_threads()
        self._reserve(len(requests), RECORDS_AHEAD)
        try:
            if self._recorder is None:
                recorder = threading.Thread(target=self._seen, args=(self._record_all,), name="recorder", daemon=True)
                recorder.start()
                self._recorder = recorder
            with self._room:
                self._arrived += len(requests)
            self._written.put((requests, written))
        except BaseException as error:
            self._stop(error)
            raise

    def flush(self) -> None:
        """Wait until every queued request has its Outcome."""
        with self._room:
            self._wait_until(lambda: self._pending == 0)
        self._check()

    def write_arrived(self, seconds: float) -> None:
        """Wait, no longer than this, until what has arrived is written; what is still on its way is not waited for."""
        with self._room:
            self._room.wait_for(lambda: self._arrived == 0 or self._fatal is not None, seconds)

    def close(self) -> None:
        """Finish what is queued, then end the threads. Raises RunStopped if something could not be written."""
        with self._room:
            self._wait_until(lambda: self._pending == 0)
        if self._receiver is not None:
            self._batches.put(None)
            self._receiver.join(None if self._fatal is None else PATIENCE)
        if self._recorder is not None:
            self._written.put(None)
            self._recorder.join()
        for _ in self._writers:  # one for each: a thread that ends for want of memory hands none on
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

    def _reserve(self, count: int, most: int) -> None:
        """Wait for room for ``count`` pictures; a batch larger than the limit passes once nothing else waits."""
        limit = max(0, most - count)
        with self._room:
            self._wait_until(lambda: self._pending <= limit)
            self._check()
            self._run_dir.check_free(self._output)
            self._pending += count

    def _wait_until(self, done: Callable[[], bool]) -> None:
        """Wait, holding ``_room``, until ``done`` or a fault. A thread that ended before ``_seen`` could see is one."""
        while not self._room.wait_for(lambda: done() or self._fatal is not None, LOOK_SECONDS):
            threads = (self._receiver, *self._writers, self._recorder)
            if any(thread is not None and not thread.is_alive() for thread in threads):
                self._fatal = RunStopped("no more pictures can be written: a thread that writes them has ended")

    def _put(self, request: WriteRequest, call: Callable[..., None], *arguments: Any) -> None:
        with self._room:
            self._arrived += 1
        self._tasks.put((request, call, arguments))

    def _release(self, count: int = 1) -> None:
        with self._room:
            self._pending -= count
            self._arrived -= count
            self._room.notify_all()

    def _receive_all(self) -> None:
        while (batch := self._batches.get()) is not None:
            requests, images = batch
            try:
                from zimage_runner.outputs import encoders  # noqa: F401 - now: the GPU draws, and torch is there

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

    def _record_all(self) -> None:
        """Life of the recorder: the lines of all batches that wait are appended, and forced to disk, together."""
        while (batch := self._written.get()) is not None:
            since, arrived = self._arrivals.arrive(self._start)
            batches = [batch]
            while len(batches) < RECORDS_AHEAD and not self._written.empty():
                following = self._written.get()
                if following is None:
                    self._written.put(None)
                    break
                batches.append(following)
            count = sum(len(requests) for requests, _ in batches)
            try:
                if self._fatal is None:
                    self._append_lines(batches, (arrived - since) / count, since, arrived)
            finally:
                self._release(count)

    def _append_lines(
        self, batches: Sequence[tuple[Sequence[WriteRequest], Sequence[Filed | str]]], *times: float
    ) -> None:
        pairs = [pair for requests, written in batches for pair in zip(requests, written, strict=True)]
        self._ledger.append_all([filed.line for _, filed in pairs if isinstance(filed, Filed)], sync=self._sync)
        for request, filed in pairs:
            if isinstance(filed, str):
                self._report_bad(request, filed)
            elif filed.error is not None:
                self._on_done(Outcome(request=request, status="failed", error=filed.error))
            else:
                self._on_done(_done(request, filed.line, *times))

    def _work(self) -> None:
        """Life of a writer: task after task, until None. Nothing is written after the first fault."""
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
        self._tasks.put(None)  # for the next: how many there are is not always known

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
            filed = self._write_item(request, lambda earlier: self.files.picture(request, pixels, seconds, earlier))
        except BadPictureError as error:
            self._report_bad(request, error_text(error))
            return
        if filed.error is not None:
            self._on_done(Outcome(request=request, status="failed", error=filed.error))
            return
        self._on_done(_done(request, filed.line, seconds, since, arrived))

    def _write_failure(self, request: WriteRequest, error: str) -> None:
        self._write_item(request, lambda earlier: self.files.failure(request, error, earlier))
        self._on_done(Outcome(request=request, status="failed", error=error))

    def _report_bad(self, request: WriteRequest, error: str) -> None:
        self._on_done(Outcome(request=request, status="bad", error=error))

    def _write_item(self, request: WriteRequest, make: Callable[[frozenset[str]], Filed]) -> Filed:
        """Write an item's files, then its line."""
        filed = make(self._earlier_images(request))
        self._ledger.append(filed.line, sync=self._sync)
        self.files.recorded(filed)
        return filed

    def _earlier_images(self, request: WriteRequest) -> frozenset[str]:
        """Names under which an earlier attempt, perhaps in another format, may have left the item's picture."""
        entry = self._ledger.entries.get(request.item_dir)
        return frozenset() if entry is None else frozenset([entry.image])


def _done(request: WriteRequest, line: dict[str, Any], seconds: float, since: float, arrived: float) -> Outcome:
    """The outcome of an item whose picture is there."""
    return Outcome(
        request=request, status="ok", sha256=line["sha256"], size=line["bytes"],
        seconds=seconds, since=since, arrived=arrived,
    )  # fmt: skip


def refused_thread(error: Exception) -> RunStopped:
    """Why a run cannot go on that was refused a thread."""
    return RunStopped(
        f"no thread could be started to write pictures ({error}): raise the limit of processes (ulimit -u) or of "
        "memory, or end other programs"
    )
