"""Counts and times in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of a request's seconds."""


class Metrics:
    """What is counted while requests come and go. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: list[int] = [0] * (len(BUCKETS) + 1)
        self._sum = self._queue_sum = 0.0

    def count(self, route: str, status: int) -> None:
        """Count an answer. ``route`` is a pattern, so that there are few."""
        with self._lock:
            self._requests[route, status] += 1

    def drew(self, seconds: float, queue_seconds: float) -> None:
        """Count a request that was answered with pictures: seconds in all, and until its first was begun."""
        with self._lock:
            place = next((n for n, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
            self._seconds[place] += 1
            self._sum += seconds
            self._queue_sum += queue_seconds

    def text(self, now: Mapping[str, tuple[str, str, float]]) -> str:
        """All of it as text. ``now``: name to type (gauge, counter), help and value."""
        return "".join(f"{line}\n" for line in self._lines(now))

    def _lines(self, now: Mapping[str, tuple[str, str, float]]) -> Iterator[str]:
        for name, (kind, about, value) in now.items():
            yield f"# HELP zimage_{name} {about}"
            yield f"# TYPE zimage_{name} {kind}"
            yield f"zimage_{name} {value:g}"
        with self._lock:
            requests, seconds, total = sorted(self._requests.items()), list(self._seconds), self._sum
            queued = self._queue_sum
        yield "# HELP zimage_requests_total Answers by route and status."
        yield "# TYPE zimage_requests_total counter"
        for (route, status), count in requests:
            yield f'zimage_requests_total{{route="{route}",status="{status}"}} {count}'
        yield "# HELP zimage_request_seconds Seconds of answered requests for pictures, with their time in the queue."
        yield "# TYPE zimage_request_seconds histogram"
        below = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), seconds, strict=True):
            below += count
            yield f'zimage_request_seconds_bucket{{le="{bound}"}} {below}'
        yield f"zimage_request_seconds_sum {total:g}"
        yield f"zimage_request_seconds_count {below}"
        yield "# HELP zimage_queue_seconds_total Seconds that those requests waited for their first picture."
        yield "# TYPE zimage_queue_seconds_total counter"
        yield f"zimage_queue_seconds_total {queued:g}"
