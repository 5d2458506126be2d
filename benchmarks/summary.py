"""The measurements in a few lines for the project's README: from the JSON files alone, never typed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scenarios import SCENARIOS
from benchmarks.statistics_of import Row, Spread, load
from benchmarks.variants import NAIVE
from benchmarks.verdicts import CLAIMS, IMPOSSIBLE, judge, spread_of

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OURS, CACHED = "ours default", "ours, prompt embeddings cached"
BATCHED = "ours default, batch chosen by the engine"
VERDICTS = {"confirmed": "helps", "no effect": "no effect", "harmful": "harms"}


def result_files(results: Path) -> list[Path]:
    """Files that hold a scenario's results, most important scenario first."""
    order = list(SCENARIOS)
    files = [path for path in results.glob("*.json") if scenario_of(path)]
    return sorted(files, key=lambda path: (order.index(scenario_of(path)), path))


def scenario_of(path: Path) -> str:
    """The scenario's name, the longest that the file's name begins with; empty for other files."""
    return max((name for name in SCENARIOS if path.stem.startswith(name)), key=len, default="")


def replaced(text: str, lines: str) -> str:
    """``text`` with ``lines`` between the two markers. Raises ValueError when they are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, once and in this order")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n{lines}{after}"


def summary(results: Path, page: str = "benchmarks/README.md") -> str:
    """A list of at most five points, the last one with a link to ``page``; one without figures is left out."""
    loaded = [load(path) for path in result_files(results)]
    points = [*_first_picture(loaded), *_pictures(loaded, 1024), *_pictures(loaded, 512), *_article(loaded)]
    if not points:
        return ""
    return "".join(f"- {point}\n" for point in [*points, _machine([data for data, _ in loaded], page)])


Loaded = list[tuple[dict[str, Any], list[Row]]]


def _find(loaded: Loaded, scenario: str, cache: str, size: int) -> dict[str, Row]:
    """Rows by contestant, of the first file of this scenario in which both this runner and the naive loop drew."""
    for data, rows in loaded:
        found = {row.variant: row for row in rows if row.cache == cache and row.first_png is not None}
        right = data["scenario"] == scenario and data["work"]["size"] == size
        if right and NAIVE.name in found and {OURS, BATCHED} & found.keys():
            return found
    return {}


def _first_picture(loaded: Loaded) -> Iterator[str]:
    parts = []
    for cache, words in (("warm", "files in the page cache"), ("dropped", "page cache dropped")):
        rows = _find(loaded, "cold_start", cache, 1024)
        if OURS not in rows:
            continue
        part = f"{words} {_against(rows[OURS].first_png, rows[NAIVE.name].first_png, 1)}"
        if CACHED in rows and cache == "warm":
            part += f"; prompt embeddings cached by an earlier run {_ratio(rows, CACHED, 'first_png', 1)}"
        parts.append(part)
    if parts:
        yield (
            "**First picture on disk**, from the start of the process, against the naive diffusers loop: "
            + "; ".join(parts)
            + "".join(
                f". {data['caveat']}" for data, _ in loaded if data["scenario"] == "cold_start" and "caveat" in data
            )
        )


def _pictures(loaded: Loaded, size: int) -> Iterator[str]:
    rows = _find(loaded, "throughput", "warm", size)
    name = BATCHED if BATCHED in rows else OURS
    if name not in rows or not rows[name].seconds_per_image or not rows[NAIVE.name].seconds_per_image:
        return
    point = _against(rows[name].seconds_per_image, rows[NAIVE.name].seconds_per_image, 3, "naive diffusers ")
    point += _fastest_rival(rows, rows[name])
    batch = f" in batches of up to {rows[name].largest_batch}" if rows[name].largest_batch > 1 else ""
    yield f"**A picture of {size}x{size}**{batch}, PNG written: {point}"


def _fastest_rival(rows: dict[str, Row], ours: Row) -> str:
    """diffusers at its best, where any settings of it beat the naive loop."""
    speeds = {name: row.seconds_per_image for name, row in rows.items() if name not in (OURS, BATCHED)}
    medians = {name: speed.median for name, speed in speeds.items() if speed is not None}
    best = min(medians, key=lambda name: medians[name])
    if best == NAIVE.name or ours.seconds_per_image is None:
        return ""
    ratio = medians[best] / ours.seconds_per_image.median
    return f"; the fastest settings of diffusers measured ({best}) {medians[best]:.3f} s: {ratio:.2f}x"


def _against(ours: Spread | None, base: Spread | None, digits: int, label: str = "") -> str:
    """``5.9 s (5.8-6.1, n=5), naive 24.6 (.., n=5): 4.2x``."""
    assert ours is not None
    assert base is not None
    return (
        f"{_figure(ours, digits)} against {label}{_figure(base, digits)}: **{base.median / ours.median:.2f}x** as fast"
    )


def _ratio(rows: dict[str, Row], name: str, metric: str, digits: int) -> str:
    ours, base = getattr(rows[name], metric), getattr(rows[NAIVE.name], metric)
    return f"{_figure(ours, digits)}: {base.median / ours.median:.2f}x"


def _figure(spread: Spread, digits: int) -> str:
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    around = f"{low}-{high}, " if low != high else ""
    return f"{spread.median:.{digits}f} s ({around}n={spread.count})"


def _article(loaded: Loaded) -> Iterator[str]:
    rows = next((rows for data, rows in loaded if data["scenario"] == "ablation"), [])
    by_name = {row.variant: row for row in rows if row.cache == "warm"}
    judged: dict[str, list[str]] = {}
    for claim in CLAIMS:
        one, other = (spread_of(by_name, name, claim.metric) for name in (claim.variant, claim.baseline))
        if claim.short and one is not None and other is not None:
            share = f" {one.median / other.median - 1:+.0%}" if other.median else ""
            told = VERDICTS.get(judge(one, other, claim.metric))
            if told is not None:
                judged.setdefault(told, []).append(f"{claim.short}{share}")
    if judged:
        told = [f"{word}: {', '.join(judged[word])}" for word in VERDICTS.values() if word in judged]
        yield f"**The article's steps**, measured: {'; '.join(told)}; impossible as printed: {len(IMPOSSIBLE)} claims"


def _machine(files: list[dict[str, Any]], page: str) -> str:
    """What the figures were taken on; several machines are all named."""
    names = []
    for data in files:
        facts, versions = data["machine"], data["machine"]["versions"]
        gpu = facts["gpu"]["name"] if facts["gpu"] else facts["processor"]
        names.append(f"one {gpu}, " + ", ".join(f"{n} {versions[n]}" for n in ("torch", "diffusers") if n in versions))
    unique = [name for name, _ in itertools.groupby(sorted(names))]
    more = f": [all figures]({page})" if page else ""
    return f"{'; '.join(unique)}; synthetic full-size weights, fresh processes, medians{more}"
