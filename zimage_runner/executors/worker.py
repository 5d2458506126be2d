"""The worker process of ``executor=process``: owns the session, draws what it is told to, and dies with its parent."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from zimage_runner.engines.faults import DeviceLost
from zimage_runner.errors import BadPictureError, RunStopped, UserError, error_text
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import BatchResult, SessionLike
from zimage_runner.executors.messages import (
    Broken,
    Drawn,
    Extend,
    Failed,
    Finished,
    LogLine,
    Ready,
    Refused,
    Start,
    Started,
    SteppedDown,
    Work,
)
from zimage_runner.signals import OF_A_QUEUE

PR_SET_PDEATHSIG = 1
UNSENT_RESULTS = 2
"""Results that may wait to be sent while the next one is drawn."""


def main(fd: int, parent: int) -> None:
    """Entry point: serve the parent process over the socket ``fd`` until it closes."""
    die_with(parent)
    os.set_inheritable(fd, False)  # or a process that a library starts would keep the socket open after our end
    for number in (signal.SIGINT, signal.SIGTERM, *OF_A_QUEUE):
        # Ending the run is the parent's affair: it lets the picture in flight finish.
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output belongs to the parent
    worker = Worker(Connection(fd))
    worker.ends_with(worker.serve)


def die_with(parent: int) -> None:
    """Be killed when the parent process ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call
        os._exit(1)


class Worker:
    """Three threads: one reads work, one draws, one sends results (and waits for pixels to arrive from the GPU)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[Work | Extend] = queue.SimpleQueue()
        self._results: queue.Queue[tuple[Work, BatchResult | dict[str, Any]]] = queue.Queue(UNSENT_RESULTS)

    def serve(self) -> None:
        """Load, say so, then draw batch after batch. Never returns: the parent's end of the socket ends the process."""
        start = self._first_message()
        logging.getLogger("zimage_runner").addHandler(_Forward(self))
        logging.getLogger("zimage_runner").setLevel(logging.INFO)
        self._start_thread(self._read, "reader")
        session = self._start(start)
        backoff = MemoryBackoff(session, auto_batch=start.auto_batch, on_step=lambda step: self.send(SteppedDown(step)))
        self.send(Ready({**session.report(), **backoff.report()}))
        self._start_thread(self._send_results, "sender")
        while True:
            match self._work.get():
                case Extend(shapes, texts):
                    self._extend(session, shapes, texts)
                    self.send(Ready({**session.report(), **backoff.report()}))
                case Work() as work:
                    self._draw(work, session, backoff)

    def ends_with(self, life: Callable[[], None]) -> None:
        """Live a thread's life. What ends it early is told to the parent, and ends the process: nobody waits for it."""
        try:
            life()
        except BaseException as error:
            self._end(error_text(error))

    def _start_thread(self, life: Callable[[], None], name: str) -> None:
        threading.Thread(target=self.ends_with, args=(life,), name=name, daemon=True).start()

    def _extend(self, session: SessionLike, shapes: Any, texts: Any) -> None:
        try:
            session.extend(shapes, texts)
        except (UserError, RunStopped) as error:
            self._end(str(error), refuses=True)
        except Exception as error:  # told to the parent, which decides
            self._end(error_text(error))

    def _draw(self, work: Work, session: SessionLike, backoff: MemoryBackoff) -> None:
        self.send(Started(work.ticket))
        try:
            for result in backoff.run(work.batch):
                self._results.put((work, result))
        except (UserError, RunStopped) as error:
            self._end(str(error), refuses=not isinstance(error, DeviceLost))
        self._results.put((work, {**session.report(), **backoff.report()}))

    def send(self, message: Any, pixels: memoryview | None = None) -> None:
        """Send a message, and the bytes that belong to it. From any thread."""
        try:
            with self._sending:
                self._connection.send(message)
                if pixels is not None:
                    self._connection.send_bytes(pixels)
        except OSError:
            os._exit(0)  # the parent closed its end, or is gone

    def _first_message(self) -> Start:
        try:
            start = self._connection.recv()
        except EOFError:
            os._exit(0)
        except Exception as error:  # e.g. a class that cannot be imported here
            self._end(error_text(error))
        assert isinstance(start, Start)
        return start

    def _start(self, start: Start) -> SessionLike:
        try:
            session = start.make_session()
            session.start()
            return session
        except (UserError, RunStopped) as error:
            self._end(str(error), refuses=True)
        except Exception as error:  # told to the parent, which decides
            logging.getLogger(__name__).info("the session could not start", exc_info=True)
            self._end(error_text(error))

    def _end(self, message: str, *, refuses: bool = False) -> NoReturn:
        """``refuses``: another worker would fare no better."""
        # Not sys.exit: with a lost GPU, Python's and CUDA's teardown may hang.
        try:
            self.send(Refused(message) if refuses else Broken(message))
        finally:
            os._exit(1)

    def _read(self) -> None:
        while True:
            try:
                self._work.put(self._connection.recv())
            except (EOFError, OSError):
                os._exit(0)

    def _send_results(self) -> None:
        while True:
            work, result = self._results.get()
            if isinstance(result, BatchResult):
                self._send_result(work, result)
            else:
                self.send(Finished(work.ticket, result))
            del work, result  # pixels, while waiting for the next

    def _send_result(self, work: Work, result: BatchResult) -> None:
        places = {id(item): n for n, item in enumerate(work.batch.items)}
        positions = [places[id(item)] for item in result.items]
        if result.images is None:
            self.send(Failed(work.ticket, positions, result.error or "unknown error", False, result.details))
            return
        try:
            pixels = result.images.wait()
        except Exception as error:  # the item boundary
            bad = isinstance(error, BadPictureError)
            self.send(Failed(work.ticket, positions, str(error) if bad else error_text(error), bad, result.details))
            return
        drawn = Drawn(work.ticket, positions, pixels.shape, result.details)
        self.send(drawn, memoryview(pixels.reshape(-1).data))


class _Forward(logging.Handler):
    """Log lines become the parent's."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.send(LogLine(record.levelno, record.name, self.format(record)))


if __name__ == "__main__":
    sys.exit("this module is started by executor=process")
