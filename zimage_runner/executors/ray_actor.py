"""What lives in each worker process of ``executor=ray``: one warm session, drawing what it is told to.

``draw`` returns as soon as the device has the work; ``collect``, in another thread, waits for the pictures. So the next
batch is being drawn while the last one's pictures travel.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import zimage_runner
from zimage_runner.engines.faults import DeviceLost
from zimage_runner.errors import BadPictureError, RunStopped, UserError, error_text
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import Batch, BatchResult, SessionLike, Sink
from zimage_runner.executors.fleet import Done, Part
from zimage_runner.executors.messages import Start
from zimage_runner.plan import Encoding
from zimage_runner.signals import OF_A_QUEUE
from zimage_runner.startup.process import begin

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "ray")
"""Whose versions must be the same on every node: they decide pictures, or how pictures and tasks travel."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What runs on a node."""

    node: str
    """Its name, for people."""
    node_id: str
    """Ray's."""
    software: dict[str, str]
    """Name -> version of what must be the same everywhere."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says when it has loaded, or cannot."""

    report: dict[str, Any]
    refused: str | None = None
    """The text of a UserError or a RunStopped: no other worker would do better."""
    broken: str | None = None
    """Another error's text: the worker is of no use."""
    lines: Sequence[tuple[int, str, str]] = ()
    """Level, logger and text of what it has logged."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch's results, or why there are none."""

    done: Done | None
    broken: str | None = None
    """The worker is of no use any more, perhaps because of an item."""
    stopped: str | None = None
    """The whole run cannot go on."""
    lines: Sequence[tuple[int, str, str]] = ()


@cache
def software() -> dict[str, str]:
    """Return the versions of what must be the same on every node, this package's own files included."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"zimage_runner": f"{zimage_runner.__version__} ({_digest_of_code()})"}


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Return what differs between the software of this process and that of a node."""
    names = dict.fromkeys([*here, *there])
    return [f"{n} {there.get(n, 'unknown')} there, {here.get(n, 'unknown')} here" for n in names
            if here.get(n) != there.get(n)]  # fmt: skip


def _digest_of_code() -> str:
    """Return the first digits of a digest of all Python files of this package."""
    root, total = Path(zimage_runner.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        total.update(b"%s %d\n%s" % (path.relative_to(root).as_posix().encode(), len(data), data))
    return total.hexdigest()[:12]


@dataclass(slots=True)
class _Task:
    """A batch from the device's taking it until its results are collected."""

    batch: Batch
    results: list[BatchResult]
    sink: Sink | None
    seconds: float
    broken: str | None = None
    stopped: str | None = None


class Drawer:
    """One worker. ``collect`` is called from a thread of its own, all else from another."""

    def __init__(self, number: int) -> None:
        begin(warns=False)  # before torch comes; the process that was started has warned
        self._name = {"worker": f"worker {number} on {socket.gethostname()}"}
        for signal_number in (signal.SIGINT, *OF_A_QUEUE):
            # Ending the run is the driver's affair: it lets the pictures in flight finish.
            signal.signal(signal_number, signal.SIG_IGN)
        self._lines: list[tuple[int, str, str]] = []
        handler = _Keep(self._lines)
        logging.getLogger("zimage_runner").addHandler(handler)
        logging.getLogger("zimage_runner").setLevel(logging.INFO)
        logging.getLogger("zimage_runner").propagate = False
        self._session: SessionLike | None = None
        self._backoff: MemoryBackoff | None = None
        self._sink: Sink | None = None
        self._refused: str | None = None
        self._steps: list[str] = []
        self._tasks: dict[int, _Task] = {}
        self._arrival = threading.Condition()

    def hello(self) -> Identity:
        """Say where this is and what runs here, before anything is loaded."""
        import ray

        return Identity(socket.gethostname(), ray.get_runtime_context().get_node_id(), software())

    def start(self, start: Start) -> Answer:
        """Load the session and warm it up."""
        if start.folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(start.folder)
        try:
            self._session = start.make_session()
            self._session.start()
        except (UserError, RunStopped) as error:
            return Answer({}, refused=str(error), lines=self._said())
        except Exception as error:
            logging.getLogger(__name__).info("the session could not start", exc_info=True)
            return Answer({}, broken=error_text(error), lines=self._said())
        self._backoff = MemoryBackoff(self._session, auto_batch=start.auto_batch, on_step=self._steps.append)
        return Answer(self._report(), lines=self._said())

    def extend(self, shapes: Sequence[Any], texts: Sequence[Encoding]) -> Answer:
        """Get ready for another job."""
        assert self._session is not None
        try:
            self._session.extend(shapes, texts)
        except (UserError, RunStopped) as error:
            return Answer({}, refused=str(error), lines=self._said())
        except Exception as error:
            return Answer({}, broken=error_text(error), lines=self._said())
        return Answer(self._report(), lines=self._said())

    def equip(self, sink: Sink | None, must: bool) -> None:
        """Write the pictures of later batches with this, where it can be opened here."""
        self._sink = None
        if sink is None:
            return
        try:
            sink.open()
            self._sink = sink
        except UserError as error:
            if must:
                self._refused = str(error)
            else:
                logging.getLogger(__name__).info("%s: pictures are sent instead", error)

    def draw(self, ticket: int, batch: Batch) -> None:
        """Draw a batch; ``collect`` returns its results."""
        assert self._session is not None
        assert self._backoff is not None
        began = time.perf_counter()
        task = _Task(batch, [], self._sink, 0.0, stopped=self._refused)
        if task.stopped is None:
            try:
                task.results = list(self._backoff.run(batch))
            except DeviceLost as error:
                task.broken = str(error)
            except (UserError, RunStopped) as error:
                task.stopped = str(error)
            except Exception as error:
                task.broken = error_text(error)
        task.seconds = time.perf_counter() - began
        with self._arrival:
            self._tasks[ticket] = task
            self._arrival.notify_all()

    def collect(self, ticket: int) -> Drawn:
        """Wait until a batch is drawn and its pictures are on the host, or written. Return the results."""
        with self._arrival:
            self._arrival.wait_for(lambda: ticket in self._tasks)
            task = self._tasks.pop(ticket)
        if task.broken is not None or task.stopped is not None:
            return Drawn(None, task.broken, task.stopped, self._said())
        began = time.perf_counter()
        try:
            places = {id(item): n for n, item in enumerate(task.batch.items)}
            parts = [self._part(result, places, task.sink) for result in task.results]
        except RunStopped as error:  # the disk is full, for instance
            return Drawn(None, stopped=str(error), lines=self._said())
        steps, self._steps[:] = list(self._steps), []
        seconds = task.seconds + (0.0 if task.sink else time.perf_counter() - began)
        return Drawn(
            Done(ticket=ticket, parts=parts, report=self._report(), seconds=seconds, steps=steps), lines=self._said()
        )

    def _part(self, result: BatchResult, places: dict[int, int], sink: Sink | None) -> Part:
        positions = [places[id(item)] for item in result.items]
        details = result.details | self._name
        if result.images is None:
            return Part(positions=positions, error=result.error or "unknown error", details=details)
        try:
            pixels = result.images.wait()
        except Exception as error:  # the item boundary
            bad = isinstance(error, BadPictureError)
            text = str(error) if bad else error_text(error)
            return Part(positions=positions, error=text, bad_picture=bad, details=details)
        if sink is None:
            return Part(positions=positions, pixels=pixels, details=details)
        written = sink.write(result.items, pixels, details, result.attempt)
        return Part(positions=positions, written=written, details=details)

    def _report(self) -> dict[str, Any]:
        assert self._session is not None
        return {**self._session.report(), **({} if self._backoff is None else self._backoff.report())}

    def _said(self) -> list[tuple[int, str, str]]:
        said, self._lines[:] = list(self._lines), []
        return said


class _Keep(logging.Handler):
    """Keeps log lines until they travel with the next answer."""

    def __init__(self, lines: list[tuple[int, str, str]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.name, self.format(record)))
