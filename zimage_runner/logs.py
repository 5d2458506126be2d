"""Where log lines go: warnings to the terminal without breaking the progress bar, everything to run.log.

With ``log.format=json`` each line of both is a JSON object: what a person is told on stderr too. Results on stdout stay
as they are.
"""

from __future__ import annotations

import codecs
import contextlib
import enum
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from zimage_runner.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    RunStopped,
    UserError,
    called,
    one_line,
    visible,
    visible_json,
)
from zimage_runner.outputs.beneath import open_file

NOBODY_READS = (errno.EIO, errno.EPIPE)
"""What writing to a closed terminal or pipe fails with."""
LOGGER = logging.getLogger("zimage_runner")
refusals: ContextVar[list[str] | None] = ContextVar("refusals", default=None)
"""Where a caller in Python (api.py) wants to have what ``refuse`` says, besides the terminal."""
refused_before: ContextVar[str | None] = ContextVar("refused_before", default=None)
"""What was said already of the job that is under way, and is not said again when it is refused for it."""
quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""Whether what is said stays off the terminal: a service's runs tell what they draw in their own log alone."""


class LogFormat(enum.Enum):
    """What a line of the log looks like."""

    text = "text"
    json = "json"
    """An object a line: time, level, message, run, and traceback where there is one."""


@dataclass(kw_only=True, slots=True)
class Log:
    """The ``log`` fields."""

    format: LogFormat = LogFormat.text
    """Of run.log and of stderr: text, or json, one object a line."""


@dataclass(slots=True)
class _Lines:
    """How lines are written in this process now."""

    format: LogFormat = LogFormat.text
    run: str | None = None
    """The run directory that they are about."""


_lines = _Lines()


def use_format(format: LogFormat) -> None:
    """Write the log's lines, from now on and wherever they go, in this format."""
    _lines.format = format


def writes_json() -> bool:
    """Whether stderr is for programs: no progress bar either."""
    return _lines.format is LogFormat.json


def json_line(level: str, message: str, created: float, run: str | None, traceback: str | None = None) -> str:
    """One line of JSON. ``level`` as Python names it; ``created`` in seconds since 1970."""
    when = datetime.fromtimestamp(created).astimezone().isoformat(timespec="milliseconds")
    line = {"time": when, "level": level.lower(), "message": message, "run": run}
    if traceback is not None:
        line["traceback"] = traceback
    return visible_json(json.dumps(line, ensure_ascii=False))


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append this package's log lines from INFO to ``path``, and to no other run's log, while the block runs."""
    others = [other for other in LOGGER.handlers if isinstance(other, _RunLog)]
    handler = _RunLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(_Json(path.parent) if writes_json() else _Visible(_TEXT_LINE))
    level, run = LOGGER.level, _lines.run
    _lines.run = str(path.parent)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    for other in others:
        LOGGER.removeHandler(other)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        _lines.run = run
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


@contextlib.contextmanager
def others_for_programs(*names: str) -> Iterator[None]:
    """Have the loggers of other packages write JSON on stderr, and their progress bars nothing, where stderr is JSON.

    The loggers from now on; progress bars while the block runs. With text, the packages write as they like.
    """
    if not writes_json():
        yield
        return
    from tqdm import tqdm

    for name in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_StderrHandler(logging.NOTSET)], False
    usual = tqdm.__init__

    def without_bar(self: tqdm, *args: Any, **given: Any) -> None:
        usual(self, *args, **{**given, "disable": True})

    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = usual


def say(text: str, file: TextIO | None = None, level: str = "info") -> bool:
    """Print a line (to stderr) for a person, above the progress bar and not through it; as JSON if that is asked for.

    If anyone can still read it: a closed terminal or pipe ends no run. What the stream's encoding has no letters for is
    written as escapes. Returns False, and says so on stderr, where the output is lost for another reason (a full disk).
    """
    if quiet.get():
        return True
    stream: TextIO = file or sys.stderr
    if file is None:
        text = for_stderr(text, level)
    return _write(text, stream)


def for_stderr(text: str, level: str = "info") -> str:
    """A line for a person, or the same for programs."""
    return json_line(level, text, time.time(), _lines.run) if writes_json() else text


def _write(text: str, stream: TextIO) -> bool:
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
        if writes_json() and stream is sys.stderr:
            return text.encode(encoding, "json").decode(encoding)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _escape_in_json(error: UnicodeError) -> tuple[str, int]:
    """What an encoding has no letters for, as JSON's escapes."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json", _escape_in_json)


def refuse(message: str) -> int:
    """Say in one line why nothing was done. Return the exit code for it."""
    line = one_line(" ".join(message.split()))
    if (wanted := refusals.get()) is not None:
        wanted.append(line)
    if message != refused_before.get():
        say(line if writes_json() else f"zimage_runner: {line}", level="error")
    return EXIT_BAD_INPUT


def command(
    argv: Sequence[str],
    doc: str | None,
    do: Callable[[Sequence[str]], int],
    *,
    bare: bool = False,
    fields: Sequence[str] = (),
) -> int:
    """Do what a command's words say, and tell in one line what is wrong with them. Return the exit code.

    ``doc`` is printed where help is asked for, and where nothing is said, unless the command is one that means
    something ``bare``. ``fields``: those of its words that may not be empty.
    """
    if {"-h", "--help"} & set(argv) or not (argv or bare):
        told = say(called(doc or ""), sys.stdout)
        return EXIT_OK if argv and told else EXIT_BAD_INPUT
    log_to_terminal()
    try:
        check_words(argv, fields)
        return do(argv)
    except (UserError, RunStopped) as error:
        return refuse(str(error))
    except (FileExistsError, NotADirectoryError) as error:  # where a folder was to be made
        return refuse(f"{error.filename} is no folder: name another" if error.filename else str(error.strerror))
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def check_words(argv: Sequence[str], fields: Sequence[str] = ()) -> None:
    """Refuse what a shell makes of a variable that is not set: as a path, nothing is the current folder.

    ``fields``: those that may not be empty either. Raises UserError.
    """
    for word in argv:
        if word in ("", *(f"{field}=" for field in fields)):
            what = f"{word} is empty" if word else "a word is empty"
            raise UserError(f"{what}: write what is meant, or leave it out (is a variable of the shell not set?)")


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


_TEXT_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Json(logging.Formatter):
    """Lines of one run."""

    def __init__(self, run: Path | None) -> None:
        super().__init__()
        self._run = None if run is None else str(run)

    def format(self, record: logging.LogRecord) -> str:
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        return json_line(record.levelname, record.getMessage(), record.created, self._run or _lines.run, traceback)


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
    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)

    def emit(self, record: logging.LogRecord) -> None:
        if quiet.get():
            return
        if writes_json():
            _write(_Json(None).format(record), sys.stderr)
            return
        text = f"zimage_runner: {one_line(record.getMessage())}"
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info)
            text = "\n".join([text, *(one_line(line) for line in traceback.splitlines())])
        say(text)
