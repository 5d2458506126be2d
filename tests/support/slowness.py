"""Limits of CPU time that hold on a busy machine, where hardware threads share a core and each second does less."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

QUIET_S = 0.005
"""CPU seconds of ``_work`` on the machine that the limits were set on, when nothing else ran there."""


def quiet_seconds(cost: Callable[[], float], limit: float, tries: int = 3) -> float:
    """Return the CPU seconds that ``cost`` says it took, as on that quiet machine.

    The least of some tries, for what other processes do only adds to it; the first one below ``limit`` is enough.
    """
    least = float("inf")
    for _ in range(tries):
        before = _slowness()
        seconds = cost()
        least = min(least, seconds / max(before, _slowness()))
        if least < limit:
            break
    return least


def _slowness() -> float:
    """How many times longer than on that quiet machine a fixed piece of work takes here and now; at least 1."""
    began = time.thread_time()
    for _ in range(20):
        _work()
    return max(1.0, (time.thread_time() - began) / 20 / QUIET_S)


def _work() -> int:
    """What Python programs do: objects, text, dictionaries, calls."""
    rows = [{"name": f"thing {n}", "values": [n, n / 3, str(n)]} for n in range(1500)]
    found = {row["name"].upper(): row for row in json.loads(json.dumps(rows))}
    return sum(len(row["values"]) for _, row in sorted(found.items()))
