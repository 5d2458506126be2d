"""What the process's exit code means, and codes that are known later. Imports next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    from zimage_runner.logs import say

    say(f"zimage_runner: {one_line(' '.join(message.split()))}")
    return EXIT_BAD_INPUT


class Later:
    """The exit code of a job whose last pictures are still on their way. Callbacks may print it or pickle it."""

    def __init__(self) -> None:
        self._code: int | None = None
        self._listeners: list[Callable[[int], object]] = []

    def __repr__(self) -> str:
        return "not known yet" if self._code is None else str(self._code)

    def __getstate__(self) -> dict[str, Any]:
        return {"_code": self._code, "_listeners": []}

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
