"""Pictures that were asked for as URLs: kept in memory for a while, under names that nobody guesses."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class KeptPictures:
    """At most so many bytes, for at most so long; the oldest go first. Thread-safe."""

    def __init__(self, *, seconds: float, most_bytes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self.bytes = 0
        """Of all that are kept."""

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a picture's file. Return its name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[name] = (self._clock() + self._seconds, media_type, data)
            self.bytes += len(data)
            self._drop()
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """Return media type and file of a picture that is still kept."""
        with self._lock:
            self._drop()
            found = self._kept.get(name)
        return None if found is None else found[1:]

    def _drop(self) -> None:
        now = self._clock()
        while self._kept:
            name, (until, _, data) = next(iter(self._kept.items()))
            if until > now and self.bytes <= self._most_bytes:
                return
            del self._kept[name]
            self.bytes -= len(data)
