"""Which process does the run of ``executor=resident``: this one, or the one that stays."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # every command line imports this
    from zimage_runner.config.schema import RunConfig


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


def belongs_elsewhere(config: RunConfig) -> bool:
    """Return whether the resident process has to draw this. A plan is printed anywhere."""
    return type(config.executor).__name__ == "ResidentExecutorConfig" and not config.dry_run and not is_resident()
