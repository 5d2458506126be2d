"""Which process does the run of ``executor=resident``: this one, or the one that stays."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes time before anything else begins
    from collections.abc import Callable, Sequence

ENDS_BEFORE = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--help", "-h")
"""Words with which no run is drawn."""


class HandOver(BaseException):
    """The composed run belongs to the resident process. Not an Exception: Hydra reports those itself."""


class _Process:
    is_resident = False


def is_resident() -> bool:
    """Return whether this process is the one that stays."""
    return _Process.is_resident


def become_resident() -> None:
    """Say that this process is the one that stays."""
    _Process.is_resident = True


def belongs_elsewhere(executor: object, *, dry_run: bool) -> bool:
    """Return whether the resident process has to draw with this executor. A plan is printed anywhere."""
    return type(executor).__name__ == "ResidentExecutorConfig" and not dry_run and not is_resident()


def draw(words: Sequence[str], here: Callable[[], int]) -> int:
    """Do the run of a command line where its executor says: ``here`` does it in this process. Return the exit code."""
    if is_asked_for(words):
        from zimage_runner.resident.client import hand_over

        return hand_over(words)
    environment = dict(os.environ)
    try:
        return here()
    except HandOver:  # a config file, or the run that is resumed, says so
        os.environ.clear()  # composing and importing may have set something for this process
        os.environ.update(environment)
        from zimage_runner.resident.client import hand_over

        return hand_over(words, repeats=True)


def is_asked_for(words: Sequence[str]) -> bool:
    """Whether a command line says itself that it wants the resident process, and draws."""
    executors = [word for word in words if word.startswith("executor=")]
    if executors[-1:] != ["executor=resident"]:
        return False
    said = [word.partition("=") for word in words]
    plans = any(name == "dry_run" and wants_plan(value) for name, _, value in said)
    return not plans and not any(word.partition("=")[0] in ENDS_BEFORE for word in words)


def wants_plan(value: str) -> bool:
    """Whether dry_run=VALUE asks for a plan instead of pictures."""
    return value.lower() not in ("false", "no", "off", "0")
