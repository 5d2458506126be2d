"""How far a run has come: a bar on a terminal; a line now and then in run.log, and on stderr where there is no bar."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from zimage_runner.errors import counted
from zimage_runner.logs import duration, say, writes_json

log = logging.getLogger(__name__)

FIRST_SECONDS, LONGEST_SECONDS = 60.0, 1800.0
SHARE = 0.05
"""Of the time gone by: a night's log has dozens of lines and not a thousand."""

tqdm.monitor_interval = 0  # no thread of its own: ``update`` is called for every picture
_terminal = threading.Lock()
"""Held by the one display that shows its bar: two would write over each other."""


def is_for_people() -> bool:
    """Whether somebody looks at stderr."""
    return sys.stderr.isatty() and not writes_json()


class ProgressLog:
    """Decides when the next line of progress is due, and words it. Thread-safe."""

    def __init__(self, planned: int, settled: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``settled`` of the ``planned`` pictures were done or given up before the clock began."""
        self._planned = planned
        self._clock = clock
        self._start = self._logged_at = clock()
        self._logged = settled
        self._lock = threading.Lock()

    def line(self, settled: int) -> str | None:
        """Return ``1,200 of 100,000 pictures (1.2 %), 0.77 s each, about 21.1 h left`` when it is due, else None."""
        now = self._clock()
        with self._lock:
            since = now - self._logged_at
            if since < min(max(FIRST_SECONDS, SHARE * (now - self._start)), LONGEST_SECONDS) or settled <= self._logged:
                return None
            each = since / (settled - self._logged)
            self._logged_at, self._logged = now, settled
        left = self._planned - settled
        if not left:
            return None  # the summary comes now
        share, speed = f"{settled / self._planned:.1%}", f"{each:.2f} s" if each < 10 else f"{each:.0f} s"
        done = f"{settled:,} of {counted(self._planned, 'picture')} ({share})"
        return f"{done}, {speed} each, about {duration(left * each)} left"


class ProgressDisplay:
    """Shows how many of a run's pictures are settled. ``update`` may be called from any thread, before ``open`` too."""

    def __init__(self, planned: int, settled: int) -> None:
        """``settled`` of the ``planned`` pictures were done or given up by earlier processes."""
        self._planned, self._before = planned, settled
        self._log = ProgressLog(planned, settled)
        self._bar: tqdm | None = None
        self.logs = True
        """Whether lines are logged: not while the log is another run's."""

    def open(self) -> None:
        """Show the bar, if this is a terminal and no other run's bar is on it. Harmless when called twice."""
        if self._bar is None and _terminal.acquire(blocking=False):
            hidden = not is_for_people()
            self._bar = tqdm(total=self._planned, initial=self._before, unit="image", disable=hidden, smoothing=0.1)

    def update(self, settled: int) -> None:
        """Show that so many are settled now."""
        self.open()  # where another run's bar was in the way
        if self._bar is not None:
            self._bar.update(settled - self._bar.n)
        if self.logs and (line := self._log.line(settled)):
            log.info("%s", line)
            if not is_for_people():
                say(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.close()
            finally:  # the terminal may be gone; another run of this process may have one
                _terminal.release()
