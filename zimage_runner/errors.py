"""Errors that a user can act on, and what the exit codes of the process mean."""

from __future__ import annotations

import os
import re
import sys

EXIT_OK = 0
EXIT_ITEMS_FAILED = 1
"""Some items failed, which are listed; of a command that compares: there is a difference."""
EXIT_BAD_INPUT = 2
"""Bad config or input, nothing started."""
EXIT_INTERRUPTED = 130
"""Ended early, resumable."""

_COMMANDS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal or an editor obeys instead of showing: controls, separators, bidi marks, halves of a pair."""


class UserError(Exception):
    """Bad configuration or input: shown as one line on stderr, exit code 2, nothing started.

    The message names the field or ``file:line``, the value, and what to write instead.
    """


class UnsupportedCheckpoint(UserError):
    """Whole weights of a kind that one engine does not compute and another may."""


class RunStopped(RuntimeError):
    """The run cannot go on; what is finished is kept and resuming does the rest. One line, exit code 130."""


class BadPictureError(RuntimeError):
    """A picture that must not be saved as good: NaN or Inf in it, or a single colour throughout."""


PROGRAM, SCRIPT = "python -m zimage_runner", "zimage-runner"


def called(text: str) -> str:
    """A text that names the program as ``python -m zimage_runner``, with the name by which it was called instead."""
    return text.replace(PROGRAM, SCRIPT) if [os.path.basename(word) for word in sys.argv[:1]] == [SCRIPT] else text


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise UserError unless low <= value <= high; NaN never is."""
    if not low <= value <= high:
        raise UserError(f"{field}={value} is out of range: use {low:g} to {high:g}")


def exception_chain(error: BaseException, *, suppressed: bool = True) -> list[BaseException]:
    """Return the error, what caused it, and what was being handled when it was raised.

    suppressed: also what ``raise ... from None`` hides.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        hidden = current.__suppress_context__ and not suppressed
        current = current.__cause__ or (None if hidden else current.__context__)
    return chain


def error_text(error: BaseException) -> str:
    """Exception type and message on one line's worth of text, for records."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_refused(error: BaseException) -> bool:
    """Whether the system refused memory, a thread or a process: nothing is wrong with the program or its input."""
    refused = ("can't start new thread", "can't allocate lock", "can't create new thread")
    return isinstance(error, MemoryError) or any(text in str(error) for text in refused)


NO_HOME = "there is no such home directory: write the whole path (./~name for a file of that name)"


def is_homeless(error: BaseException) -> bool:
    """Whether pathlib knows no home directory for a path that begins with ~."""
    return isinstance(error, RuntimeError) and "home directory" in str(error)


def counted(number: int, one: str, many: str = "") -> str:
    """``1 picture``, ``2,000 pictures``; with ``many`` where the plural is not made with an s: "picture is", "are"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def visible(text: str) -> str:
    """Text of any origin for a terminal or log: control and bidi characters as ``\\x1b``, line breaks and tabs kept."""
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def visible_json(text: str) -> str:
    """JSON text with the same characters as JSON's own escapes."""
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str, limit: int | None = None) -> str:
    """Text that is safe on a terminal: no line breaks, control or bidi characters, at most ``limit`` characters."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if limit is None or len(clean) <= limit else clean[: limit - 3] + "..."
