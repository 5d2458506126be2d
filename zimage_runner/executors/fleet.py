"""What the pool of ``executor=ray`` needs of the system that runs its workers, and what it hears from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zimage_runner.executors.base import Batch, Sink, Written
from zimage_runner.plan import Encoding

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.warmup import WarmupShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Results of some items of a batch: exactly one of pixels, written and error is set."""

    positions: list[int]
    """Which of the batch's items."""
    pixels: np.ndarray | None = None
    """uint8 [n, height, width, 3]."""
    written: list[Written] | None = None
    """What became of each item where the worker wrote it."""
    error: str | None = None
    bad_picture: bool = False
    """It was drawn, but is none (NaN ..); ``error`` says why."""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hired:
    """A worker has a place and begins to load."""

    node: str
    """The node's name, for people."""
    is_elsewhere: bool = False
    """Whether that is another machine than this process's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A worker's session is loaded and warm, or ready for another job."""

    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A worker's session cannot start because of something the user can mend."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """The whole run cannot go on: its disk is full, for instance."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A worker has drawn a batch."""

    ticket: int
    parts: list[Part]
    report: dict[str, Any]
    seconds: float
    """That it was busy with the batch."""
    steps: list[str] = field(default_factory=list)
    """Steps down that it took for want of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """A worker is gone."""

    how: str
    """Follows "the worker"."""
    started: frozenset[int] = frozenset()
    """Tickets that it was, or may have been, drawing."""
    blameless: bool = False
    """Its node failed, or the way there: no item is to blame."""
    broken: bool = False
    """It said itself that it cannot go on."""


Event = Hired | Ready | Refused | Stopped | Done | Died


@dataclass(frozen=True, slots=True)
class Notice:
    """Something has happened to a worker. ``fetch`` says what, and may have to bring pictures from another machine."""

    worker: int
    fetch: Callable[[], Event]


class Fleet(Protocol):
    """Runs workers somewhere. Used from one thread."""

    def connect(self) -> None:
        """Raise UserError where there is no system to run workers."""
        ...

    def places(self) -> int:
        """How many workers the system has, or is asked to make, room for now. Cheap: asked before every batch."""
        ...

    def hire(self, worker: int) -> None:
        """Ask for a worker. Answered by Hired, then Ready."""
        ...

    def load(self, worker: int) -> None:
        """Have a worker that was hired load its session. Answered by Ready or Refused."""
        ...

    def extend(self, worker: int, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> None:
        """Have a worker get ready for another job. Answered by Ready."""
        ...

    def equip(self, worker: int, sink: Sink | None, *, must: bool) -> None:
        """Have a worker write the pictures of what it draws from now on; None: send them.

        Where it does not see the run's directory it sends them too. If it ``must`` write, Stopped is then the answer to
        its next batch.
        """
        ...

    def draw(self, worker: int, ticket: int, batch: Batch) -> None:
        """Queue a batch in a worker. Answered by Done."""
        ...

    def poll(self, timeout_s: float) -> list[Notice]:
        """Return what has happened, after waiting for something to happen."""
        ...

    def fire(self, worker: int) -> None:
        """End a worker at once. Nothing more is heard of it."""
        ...

    def describe(self) -> str:
        """What a worker asks of a node, and what the nodes have, for a message."""
        ...

    def close(self) -> None: ...
