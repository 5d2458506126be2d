"""The Executor contract: batches of work items in, results out.

    executor = config.create(make_session, stop=stop, health=memory.health)
    report = executor.start()                  # loads and warms the model
    for result in executor.run(batches):       # in any order; each item comes back exactly once
        ...
    executor.close()

``batches`` is read lazily, at most a few batches ahead: ending it early (a signal) leaves only the items in flight to
finish. What belongs to one item comes back as that item's error; what ends the run (the device is lost, the worker
cannot be started) is raised as RunStopped. ``run`` may be called again and again.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zimage_runner.engines.base import GeneratedBatch, PendingImages
from zimage_runner.errors import BadPictureError
from zimage_runner.memory.policies import Health
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.plan import Encoding, WorkItem
    from zimage_runner.session import SessionConfig
    from zimage_runner.warmup import WarmupShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Items of one bucket, drawn together."""

    items: Sequence[WorkItem]
    attempt: int = 1
    """Above 1 when the first try gave a bad picture; the session then decodes in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What became of an item whose files were written where it was drawn. Its line in the ledger is still to come."""

    status: str
    """ok, failed or bad (not a picture, nothing written)."""
    line: dict[str, Any] = field(default_factory=dict)
    """For the ledger; empty when bad."""
    error: str | None = None


class Sink(Protocol):
    """Writes pictures where they are drawn. Picklable: it crosses to the worker once."""

    def open(self) -> None:
        """Get ready in the worker. Raises UserError where the run's directory is not to be seen from there."""
        ...

    def write(
        self, items: Sequence[WorkItem], pixels: np.ndarray, details: dict[str, Any], attempt: int
    ) -> list[Written]:
        """Write the items' files; picture i (uint8 [n, height, width, 3]) is item i's. Raises RunStopped."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """Pictures of ``items``, or the error that all of them share."""

    items: Sequence[WorkItem]
    images: PendingImages | None = None
    """Picture i is item i's. None when ``error`` or ``written`` is set."""
    written: Sequence[Written] | None = None
    """What became of item i, where a worker has written it."""
    error: str | None = None
    """Why there is no picture: exception type and message."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the record: timings (seconds of encode, denoise, decode), gpu_memory, recovery (steps, as text)."""
    attempt: int = 1


class BrokenImages(PendingImages):
    """Pictures that turned out to be none, for instance in another process."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def wait(self) -> np.ndarray:
        raise BadPictureError(self._reason)


class SessionLike(Protocol):
    """What executors need of ``zimage_runner.session.Session``."""

    def start(self) -> None:
        """Load, place, compile and warm up. Raises UserError for what the user can mend."""
        ...

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        """Draw items of one bucket. Raises whatever the engine raises.

        attempt > 1: decode in float32. tiled: decode in tiles, for pictures that do not fit otherwise.
        """
        ...

    def free_memory(self) -> bool:
        """Drop whatever can be made again, after generate ran out of memory; whether the same call may fit now."""
        ...

    def useful_batch(self) -> int | None:
        """Most pictures at a time that gain anything; None: as many as fit. Asked after the first batch of a size."""
        ...

    @property
    def tiles(self) -> bool:
        """Whether ``tiled`` saves memory."""
        ...

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> None:
        """Get ready for another job: warm up its shapes that are not warm yet."""
        ...

    def report(self) -> dict[str, Any]:
        """Plain data (JSON): seconds of each phase, numerics, versions, gpu_memory."""
        ...

    def close(self) -> None: ...


SessionFactory = Callable[[], SessionLike]
"""Makes an unstarted session. Picklable (a functools.partial of a class), so that it can cross to another process."""


class Executor(abc.ABC):
    """Runs batches somewhere."""

    overlaps: bool = False
    """Whether ``run`` may be called again while the results of an earlier call are still being taken, and returns
    pictures that are still on their way: the next job may then begin before this one has ended."""
    on_overdue: Callable[[Sequence[WorkItem], str], None] | None = None
    """Hears, from another thread, of items of ``run`` that take too long and cannot be given up, and of the reason."""
    batches_ahead: int = 1
    """Batches that ``run`` reads before the first of them is drawn. With 1 it asks for one once it has nothing to do,
    so that ``batches`` may let it wait."""

    has_workers_elsewhere: bool = False
    """Whether pictures may be drawn on other machines, and so be written there."""

    @abc.abstractmethod
    def start(self) -> dict[str, Any]:
        """Start the session; its report."""

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> bool:
        """Get the started session ready for another job's shapes and texts (as Session's constructor takes them).

        False means that this executor cannot, and that the other job needs a new one.
        """
        return False

    def write_with(self, sink: Sink | None) -> None:  # noqa: B027
        """Offer a way to write the next runs' pictures in the workers, for executors whose workers are elsewhere."""

    @abc.abstractmethod
    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        """Yield the results of every batch; a batch may come back in parts."""

    @property
    def is_lost(self) -> bool:
        """Whether the session's process has died while it had nothing to draw. From the thread of ``run`` alone."""
        return False

    def recover(self) -> None:  # noqa: B027
        """Replace a session that ``is_lost``; ``run`` would, with its next batch. Raises RunStopped."""

    @abc.abstractmethod
    def report(self) -> dict[str, Any]:
        """The session's report as it is now (peak memory, recovery steps, restarts)."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the session. Harmless when called twice or before start."""


@dataclass(kw_only=True, slots=True)
class ExecutorConfig(abc.ABC):
    """An option of the ``executor`` group."""

    def adapt(self, session: SessionConfig) -> SessionConfig:
        """The session's settings as they should be under this executor."""
        return session

    @abc.abstractmethod
    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        """The executor; nothing is started yet.

        auto_batch: find how many pictures of each size fit into the GPU's memory; batches are split accordingly.
        health: when a worker process is replaced. stop: once set, nothing is restarted any more.
        """
