"""Warnings about the prompts while they are read: one of each kind in a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

log = logging.getLogger(__name__)
_warned: ContextVar[set[str] | None] = ContextVar("warned", default=None)


@contextlib.contextmanager
def once_a_run(*never: str) -> Iterator[None]:
    """Log only the first warning of each kind within this block, and none of the kinds ``never``."""
    token = _warned.set(set(never))
    try:
        yield
    finally:
        _warned.reset(token)


def warn_once(kind: str, message: str) -> None:
    """Log ``message`` as a warning, unless one of its ``kind`` was logged before."""
    warned = _warned.get()
    if warned is not None:
        if kind in warned:
            return
        warned.add(kind)
    log.warning("%s", message)
