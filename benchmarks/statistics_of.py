"""Figures of a results file: medians and spreads of each contestant."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("start", "import", "load", "move", "compile", "warm-up", "first picture")
"""What the time to the first picture is made of, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, smallest and largest of several processes' values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values."""
        if not values:
            return None
        return cls(median=statistics.median(values), low=min(values), high=max(values), count=len(values))

    @property
    def half_width(self) -> float:
        """Half the range: what the processes of one contestant differ by."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One contestant under one state of the page cache."""

    variant: str
    cache: str
    ours: bool
    engine: str | None
    first_png: Spread | None
    seconds_per_image: Spread | None
    """Mean interval between pictures after the first, of each process."""
    p95: Spread | None
    """95th percentile of those intervals."""
    jitter: Spread | None
    """Their standard deviation."""
    peak_allocated: Spread | None
    peak_reserved: Spread | None
    peak_device: Spread | None
    """By the driver's count, with the CUDA context and what was allocated past torch."""
    phases: dict[str, float]
    """Median seconds of each of PHASES."""
    failures: list[str]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A results file and its rows, in the scenario's order."""
    data = json.loads(path.read_text(encoding="utf-8"))
    caches = list(dict.fromkeys(run["cache"] for run in data["runs"]))
    rows = []
    for cache, (name, about) in itertools.product(caches, data["variants"].items()):
        runs = [run for run in data["runs"] if run["variant"] == name and run["cache"] == cache]
        if runs:
            rows.append(_row(name, cache, about["ours"], runs))
    return data, rows


def _row(name: str, cache: str, ours: bool, runs: list[dict[str, Any]]) -> Row:
    good = [run for run in runs if not run["log_tail"]]
    drew = [run for run in good if run["intervals"]]

    def of(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> Spread | None:
        return Spread.of([v for v in map(value, runs) if v is not None])

    phases = [phases_of(run) for run in good if run["readings"]]
    return Row(
        variant=name,
        cache=cache,
        ours=ours,
        engine=next((run["readings"].get("engine") for run in good), None),
        first_png=of(good, lambda run: run["first_png_seconds"]),
        seconds_per_image=of(drew, lambda run: statistics.mean(run["intervals"])),
        p95=of(drew, lambda run: percentile(run["intervals"], 0.95)),
        jitter=of(drew, lambda run: statistics.pstdev(run["intervals"])),
        peak_allocated=of(good, lambda run: run["readings"].get("memory", {}).get("peak_allocated_gb")),
        peak_reserved=of(good, lambda run: run["readings"].get("memory", {}).get("peak_reserved_gb")),
        peak_device=of(good, lambda run: run.get("peak_device_gb")),
        phases={p: statistics.median(each[p] for each in phases) for p in PHASES} if phases else {},
        failures=[f"exit {run['returncode']}: {_last_line(run['log_tail'])}" for run in runs if run["log_tail"]],
    )


def phases_of(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each of PHASES in one process; ``start`` is what is left: interpreter, plan, run directory."""
    given = run["readings"].get("phases", {})
    found: dict[str, float] = {phase: 0.0 for phase in PHASES}  # noqa: C420
    found["import"] = given.get("import", 0.0)
    found["move"] = given.get("to_device", 0.0)
    found["compile"] = given.get("compile", given.get("prepare", 0.0))
    found["warm-up"] = given.get("warm_up", 0.0) + given.get("encode", 0.0)
    if "load" in given:  # this runner: the parts above are inside its load
        found["load"] = max(0.0, given["load"] - found["import"] - found["move"] - found["compile"])
        found["first picture"] = run["readings"].get("images", {}).get("first_seconds") or 0.0
    else:
        found["load"] = given.get("from_pretrained", 0.0)
        found["first picture"] = given.get("first_image", 0.0) + given.get("first_png", 0.0)
    total = run["first_png_seconds"] or 0.0
    found["start"] = max(0.0, total - sum(found.values()))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
