"""Small plots as inline SVG: points over time, with a line through their middle. No script, no library."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 560, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 22
MOST_POINTS = 400
BINS = 40

Point = tuple[float, float]
"""Seconds since the run began, and a value."""


def plot(title: str, points: Sequence[Point], unit: str, marks: Sequence[float] = ()) -> str:
    """SVG of ``points``; ``marks`` are instants drawn as ticks at the foot (failures). Empty without two points."""
    if len(points) < 2:
        return ""
    last = max(max(t for t, _ in points), *marks) if marks else max(t for t, _ in points)
    span = max(last, 1e-9)
    top = _round_up(_percentile([v for _, v in points], 0.99) * 1.05)

    def place(t: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * t / span
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(value, top) / top)
        return f"{x:.1f},{y:.1f}"

    dots = "".join(
        f'<circle cx="{p[0]}" cy="{p[1]}" r="1.6"/>' for p in (place(*point).split(",") for point in _thinned(points))
    )
    line = " ".join(place(*point) for point in _middle(points, span))
    x_of = lambda t: float(place(t, 0).split(",")[0])  # noqa: E731
    ticks = "".join(f'<path class="mark" d="M{x_of(t):.1f} {HEIGHT - BOTTOM}v-9"/>' for t in list(marks)[:MOST_POINTS])
    lines = "".join(
        f'<path class="axis" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        for value in (0, top / 2, top)
        for y in (float(place(0, value).split(",")[1]),)
    )
    return (
        f'<figure class="plot"><figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{lines}{dots}'
        f'<polyline points="{line}"/>{ticks}'
        f'<text x="{LEFT}" y="{HEIGHT - 5}">0</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(_duration(span))}</text></svg></figure>'
    )


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    step = -(-len(points) // MOST_POINTS)
    return points[::step]


def _middle(points: Sequence[Point], span: float) -> list[Point]:
    """The median of each stretch of time."""
    bins: dict[int, list[Point]] = {}
    for point in points:
        bins.setdefault(min(BINS - 1, int(point[0] / span * BINS)), []).append(point)
    return [
        (statistics.fmean(t for t, _ in some), statistics.median(v for _, v in some))
        for _, some in sorted(bins.items())
    ]


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _round_up(value: float) -> float:
    """The next number of 1, 2, 3, 4, 5, 6 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** len(f"{int(value)}") if value >= 1 else 1.0
    while scale > value:
        scale /= 10
    return next(step * scale for step in (1, 2, 3, 4, 5, 6, 8, 10, 20) if step * scale >= value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
