"""What the supervising process and its worker tell each other. Pickled, except for pixels, which follow as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zimage_runner.executors.base import Batch, SessionFactory
from zimage_runner.plan import Encoding
from zimage_runner.warmup import WarmupShape


@dataclass(frozen=True, slots=True)
class Start:
    """To the worker, first: what to load."""

    make_session: SessionFactory
    auto_batch: bool
    folder: str | None = None
    """Where relative names of files start, on a machine that has it: Ray starts workers elsewhere."""


@dataclass(frozen=True, slots=True)
class Extend:
    """To the worker, between runs: get ready for another job. Answered by Ready."""

    shapes: Sequence[WarmupShape]
    texts: Sequence[Encoding]


@dataclass(frozen=True, slots=True)
class Work:
    """To the worker: a batch."""

    ticket: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Ready:
    """The session is loaded and warm."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """The session cannot start or go on, and no other one could (a UserError, a RunStopped); the worker ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The session cannot start or go on; the worker ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Started:
    """The batch is being drawn."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures of some items of a batch: uint8 pixels of ``shape`` follow."""

    ticket: int
    positions: list[int]
    """Which of the batch's items."""
    shape: tuple[int, ...]
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failed:
    """Some items of a batch have no picture."""

    ticket: int
    positions: list[int]
    error: str
    bad_picture: bool
    """It was drawn, but is none (NaN ..)."""
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """All results of the batch were sent."""

    ticket: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """The worker draws smaller batches, or decodes in tiles, from now on."""

    step: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A log record of the worker."""

    level: int
    logger: str
    text: str
