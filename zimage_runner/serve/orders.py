"""A request's pictures: planned, waited for, checked and encoded."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, RunStopped, error_text
from zimage_runner.executors.base import BatchResult
from zimage_runner.outputs.config import Output
from zimage_runner.runner.spec import RunSpec
from zimage_runner.serve.scheduler import Place, Scheduler

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

NOTHING_SENT: Mapping[str, str] = MappingProxyType({})
MAX_ATTEMPTS = 2
"""As in a run: a picture that comes out bad is drawn once more."""


class NotDrawn(Exception):
    """A picture could not be drawn, though others can."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture."""

    data: bytes
    """The file."""
    seed: int


class PictureOrder:
    """Asks the scheduler for a plan's pictures; ``done`` is their list, in the plan's order, or the error."""

    def __init__(
        self,
        spec: RunSpec,
        output: Output,
        scheduler: Scheduler,
        pool: ThreadPoolExecutor,
        sent_as: Mapping[str, str] = NOTHING_SENT,
    ) -> None:
        """``output``: how the pictures are encoded. ``pool``: for what takes time and is not drawing.

        ``sent_as``: what the records call the files that the pictures start from, by their field.
        """
        self.spec = spec
        self._sent_as = sent_as
        self.items = list(spec.plan.items)
        self.waiting: deque[Place] = deque(Place(item) for item in self.items)
        self.done: Future[list[Picture]] = Future()
        self.queue_seconds: float | None = None
        """From ``submit`` until its first picture was begun."""
        self._submitted = time.perf_counter()
        self._output = output
        self._scheduler = scheduler
        self._pool = pool
        self._lock = threading.Lock()
        self._pictures: dict[int, Picture] = {}
        """By the item's identity."""

    def submit(self) -> None:
        """Take places in the queue. Raises Full, RunStopped."""
        self._submitted = time.perf_counter()
        self._scheduler.submit(self)

    def begin(self) -> None:
        if self.queue_seconds is None:
            self.queue_seconds = time.perf_counter() - self._submitted

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.done.cancel()
        self._scheduler.cancel(self)

    def take(self, result: BatchResult, position: int) -> None:
        """Called from the drawing thread: everything that takes time is done elsewhere."""
        if self.done.done():
            return
        item = result.items[position]
        if result.images is None:
            self._give_up(NotDrawn(result.error or "unknown error"))
        else:
            self._pool.submit(self._guarded, self._finish, result, position, item)

    def fail(self, error: str) -> None:
        """Give up: the model is gone."""
        self._give_up(RunStopped(error))

    def _give_up(self, error: Exception) -> None:
        """One picture that is missing is an error of the whole request."""
        with contextlib.suppress(InvalidStateError):  # somebody else was faster
            self.done.set_exception(error)
        self._scheduler.cancel(self)

    def _guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:  # the client gets an answer whatever it is
            log.error("a picture could not be finished: %s", error_text(error), exc_info=error)
            self._give_up(NotDrawn("a picture could not be finished: the service's log says why"))

    def _finish(self, result: BatchResult, position: int, item: WorkItem) -> None:
        from zimage_runner.outputs.encoders import check_pixels, encode

        assert result.images is not None
        try:
            pixels: np.ndarray = result.images.wait()[position]
            check_pixels(pixels, allow_constant=self._output.allow_constant)
        except BadPictureError as error:
            self._again(item, result.attempt, str(error))
            return
        recipe = self.spec.recipe(item, self._scheduler.report())
        for field, name in self._sent_as.items():
            recipe["inputs"][field]["path"] = name
        if (net := recipe.get("inputs", {}).get("controlnet")) is not None:  # where it lies is the service's own affair
            net["path"] = os.path.basename(net["path"])
        picture = Picture(encode(pixels, recipe, self._output), item.seed)
        with self._lock:
            self._pictures[id(item)] = picture
            complete = len(self._pictures) == len(self.items)
        if complete:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                self.done.set_result([self._pictures[id(item)] for item in self.items])

    def _again(self, item: WorkItem, attempt: int, error: str) -> None:
        if attempt >= MAX_ATTEMPTS:
            self._give_up(NotDrawn(f"the picture came out bad {attempt} times: {error}"))
            return
        log.warning("a picture came out bad (%s): drawing it once more", error)
        try:
            self._scheduler.submit_again(self, Place(item, attempt=attempt + 1))
        except RunStopped as stopped:
            self.fail(str(stopped))


def numbered(spec: RunSpec, number: int) -> RunSpec:
    """The spec with items whose folder names are their own: executors tell items apart by them."""
    items = [replace(item, prompt_index=number) for item in spec.plan.items]
    return replace(spec, plan=replace(spec.plan, items=items))
