"""What the process's exit code means, and codes that are known later. Imports next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable

from zimage_runner.errors import one_line

EXIT_OK = 0
EXIT_ITEMS_FAILED = 1
"""Some items failed, which are listed; of a command that compares: there is a difference."""
EXIT_BAD_INPUT = 2
"""Bad config or input, nothing started."""
EXIT_INTERRUPTED = 130
"""Ended early, resumable."""


def refuse(message: str) -> int:
    """Say in one line why nothing was done; the exit code for it."""
    print(f"zimage_runner: {one_line(' '.join(message.split()))}", file=sys.stderr)
    return EXIT_BAD_INPUT


class Later:
    """The exit code of a job whose last pictures are still on their way."""

    def __init__(self) -> None:
        self._code: int | None = None
        self._listeners: list[Callable[[int], object]] = []

    def then(self, listener: Callable[[int], object]) -> None:
        """Call it once the code is known."""
        if self._code is not None:
            listener(self._code)
        else:
            self._listeners.append(listener)

    def tell(self, code: int) -> None:
        """The code is known."""
        self._code = code
        for listener in self._listeners:
            listener(code)


def when_known(code: int | Later, listener: Callable[[int], object]) -> None:
    """Call ``listener`` with an exit code: now, or once it is known."""
    if isinstance(code, Later):
        code.then(listener)
    else:
        listener(code)
