"""Where log lines go: warnings to the terminal without breaking the progress bar, everything to run.log."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from zimage_runner.errors import EXIT_BAD_INPUT, one_line, visible
from zimage_runner.outputs.beneath import open_file

NOBODY_READS = (errno.EIO, errno.EPIPE)
"""What writing to a closed terminal or pipe fails with."""
LOGGER = logging.getLogger("zimage_runner")
refusals: ContextVar[list[str] | None] = ContextVar("refusals", default=None)
"""Where a caller in Python (api.py) wants to have what ``refuse`` says, besides the terminal."""


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append this package's log lines from INFO to ``path``, and to no other run's log, while the block runs."""
    others = [other for other in LOGGER.handlers if isinstance(other, _RunLog)]
    handler = _RunLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(_Visible("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    for other in others:
        LOGGER.removeHandler(other)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()
        for other in others:
            LOGGER.addHandler(other)


def log_to_terminal() -> None:
    """Warnings and worse go to stderr, one line each, a traceback below it. Harmless when called twice."""
    if any(isinstance(h, _StderrHandler) for h in LOGGER.handlers):
        return
    LOGGER.addHandler(_StderrHandler())
    LOGGER.propagate = False


def say(text: str, file: TextIO | None = None) -> bool:
    """Print a line (to stderr) for a person, above the progress bar and not through it.

    If anyone can still read it: a closed terminal or pipe ends no run. What the stream's encoding has no letters for is
    written as escapes. Returns False, and says so on stderr, where the output is lost for another reason (a full disk).
    """
    stream: TextIO = file or sys.stderr
    text = _in_encoding_of(stream, visible(text))
    bars = sys.modules.get("tqdm")  # without it there is no bar
    try:
        if bars is None:
            print(text, file=stream, flush=True)
        else:
            bars.tqdm.write(text, file=stream)
            stream.flush()
    except OSError as error:
        _silence(stream)
        if error.errno not in NOBODY_READS and stream is sys.stdout:
            say(f"zimage_runner: standard output cannot be written ({error.strerror})")
            return False
    except ValueError:
        pass  # it is closed
    return True


def _in_encoding_of(stream: TextIO, text: str) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(LookupError):
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def refuse(message: str) -> int:
    """Say in one line why nothing was done. Return the exit code for it."""
    line = one_line(" ".join(message.split()))
    if (wanted := refusals.get()) is not None:
        wanted.append(line)
    say(f"zimage_runner: {line}")
    return EXIT_BAD_INPUT


def duration(seconds: float) -> str:
    """Return a duration as a person would say it: 47 s, 12 min, 21.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _silence(stream: TextIO) -> None:
    """Let everything go nowhere, also what is still in its buffer: Python exits with 120 if it cannot write that."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Visible(logging.Formatter):
    """A log is read on a terminal too."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _RunLog(logging.FileHandler):
    """A full disk or a vanished directory is met and reported by the writer of the pictures, not here."""

    def _open(self) -> TextIO:
        folder, name = os.path.split(self.baseFilename)
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = open_file(root, name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        finally:
            os.close(root)
        return open(fd, "a", encoding=self.encoding, errors=self.errors)  # pyright: ignore[reportReturnType]

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the file is opened at the first line
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _StderrHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = f"zimage_runner: {one_line(record.getMessage())}"
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info)
            text = "\n".join([text, *(one_line(line) for line in traceback.splitlines())])
        say(text)
