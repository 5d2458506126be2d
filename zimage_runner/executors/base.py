"""The Executor contract: batches of work items in, results out.

    executor = config.create(make_session)
    report = executor.start()                  # loads and warms the model
    for result in executor.run(batches):       # in any order; each item comes back exactly once
        ...
    executor.close()

``batches`` is read lazily, at most a few batches ahead: ending it early (a signal) leaves only the items in flight to
finish, and putting a batch back into it (a bad picture's second try) works until it ends. What belongs to one item
comes back as that item's error; what ends the run (the model cannot be loaded, the device is lost for good) is raised.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from zimage_runner.engines.base import PendingImages
    from zimage_runner.plan import WorkItem


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Items of one bucket, drawn together."""

    items: Sequence[WorkItem]
    attempt: int = 1
    """Above 1 when the first try gave a bad picture; the session then decodes in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """Pictures of ``items``, or the error that all of them share."""

    items: Sequence[WorkItem]
    images: PendingImages | None = None
    """Picture i is item i's. None when ``error`` is set."""
    error: str | None = None
    """Why there is no picture: exception type and message."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the record: timings (seconds of encode, denoise, decode, total), gpu_memory, recovery steps."""
    attempt: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedBatch:
    """What a session returns for one batch."""

    images: PendingImages
    details: dict[str, Any] = field(default_factory=dict)
    """As in BatchResult."""


class SessionLike(Protocol):
    """What executors need of ``zimage_runner.session.Session``."""

    def start(self) -> None:
        """Load, place, compile and warm up. Raises UserError for what the user can mend."""
        ...

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1) -> GeneratedBatch:
        """Draw items of one bucket. Raises whatever the engine raises."""
        ...

    def report(self) -> dict[str, Any]:
        """Plain data (JSON): seconds of each phase, numerics, versions, gpu_memory."""
        ...

    def close(self) -> None: ...


SessionFactory = Callable[[], SessionLike]
"""Makes an unstarted session. Picklable (a functools.partial of a class), so that it can cross to another process."""


class Executor(abc.ABC):
    """Runs batches somewhere."""

    @abc.abstractmethod
    def start(self) -> dict[str, Any]:
        """Start the session; its report."""

    @abc.abstractmethod
    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        """Yield the results of every batch; a batch may come back in parts."""

    @abc.abstractmethod
    def report(self) -> dict[str, Any]:
        """The session's report as it is now (peak memory at the end of the run), restarts included."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the session. Harmless when called twice or before start."""


@dataclass(kw_only=True, slots=True)
class ExecutorConfig(abc.ABC):
    """An option of the ``executor`` group."""

    @abc.abstractmethod
    def create(self, make_session: SessionFactory) -> Executor:
        """The executor; nothing is started yet."""
