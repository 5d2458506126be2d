"""How soon a thread that waits for the interpreter's lock gets it, while libraries are imported beside other work."""

from __future__ import annotations

import sys
import threading

SWITCH_INTERVAL = 0.0002
"""Seconds until the importing thread hands the GIL over; the default 5 ms, after every system call of the others, would
add up to seconds."""

_lock = threading.Lock()
_users = 0
_usual = 0.0


def switch_quickly() -> None:
    """Hand the lock over soon, until as many ``switch_as_usual`` have followed."""
    global _users, _usual
    with _lock:
        if _users == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_INTERVAL)
        _users += 1


def switch_as_usual() -> None:
    """Undo one ``switch_quickly``."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            sys.setswitchinterval(_usual)
