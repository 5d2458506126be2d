"""Which process does the run of ``executor=resident``: this one, or the one that stays."""

from __future__ import annotations


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
