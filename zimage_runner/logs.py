"""Where log lines go: warnings to the terminal without breaking the progress bar, everything to run.log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

LOGGER = logging.getLogger("zimage_runner")


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append this package's log lines from INFO to ``path`` while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()


def log_to_terminal() -> None:
    """Warnings and worse go to stderr, one line each. Harmless when called twice."""
    if any(isinstance(h, _StderrHandler) for h in LOGGER.handlers):
        return
    LOGGER.addHandler(_StderrHandler())
    LOGGER.propagate = False


class _StderrHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"zimage_runner: {self.format(record)}", file=sys.stderr)
