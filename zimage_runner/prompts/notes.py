"""What is told of the prompts while they are read, each kind once a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

log = logging.getLogger(__name__)
_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def once_a_run() -> Iterator[None]:
    """Within this block the first message of a kind is logged, and no further one."""
    token = _told.set(set())
    try:
        yield
    finally:
        _told.reset(token)


def tell(kind: str, message: str) -> None:
    """Log ``message`` as a warning, unless one of its ``kind`` was."""
    told = _told.get()
    if told is not None:
        if kind in told:
            return
        told.add(kind)
    log.warning("%s", message)
