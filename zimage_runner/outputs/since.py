"""How long the program has been running, for a run's summary."""

from __future__ import annotations

import os
import time


def started() -> float | None:
    """Seconds between the machine's start and this process'; None where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # The command name (field 2) may hold spaces and brackets; field 22 is the 20th after it.
            return int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return None


class _Program:
    started: float | None = None
    """Of the program that the run belongs to, where that is another process than this one."""


def count_from(program_started: float | None) -> None:
    """Let the program be one that was started then (as ``started`` has it), until the next call."""
    _Program.started = program_started


def process_seconds() -> float | None:
    """Seconds since the program was started, imports and loading included; None where the system does not tell."""
    since = started() if _Program.started is None else _Program.started
    try:
        return None if since is None else time.clock_gettime(time.CLOCK_BOOTTIME) - since
    except (OSError, AttributeError):
        return None
