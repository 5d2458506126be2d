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

from benchmarks.harness import last_error, seconds_a_picture

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
    """Time from the end of the first batch to the last picture, for each picture between, of each process."""
    p95: Spread | None
    """95th percentile of those intervals."""
    jitter: Spread | None
    """Their standard deviation."""
    busy: Spread | None
    """Percent of the time after the first batch in which the GPU ran any kernel, as the driver samples it."""
    largest_batch: int
    """Most pictures drawn together."""
    encoder: bool | None
    """Whether the text encoder was loaded; None where that is not told."""
    peak_allocated: Spread | None
    peak_reserved: Spread | None
    peak_device: Spread | None
    """By the driver's count, with the CUDA context and what was allocated past torch."""
    phases: dict[str, float]
    """Median seconds of each of PHASES."""
    failures: list[str]
    """Why processes failed."""
    skipped: int
    """Processes that were not started for want of time."""


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A results file and its rows, in the scenario's order."""
    data = json.loads(path.read_text(encoding="utf-8"))
    skipped = data.get("skipped", [])
    caches = list(dict.fromkeys(run["cache"] for run in [*data["runs"], *skipped]))
    rows = []
    for cache, (name, about) in itertools.product(caches, data["variants"].items()):
        runs = [run for run in data["runs"] if run["variant"] == name and run["cache"] == cache]
        missed = sum(each["variant"] == name and each["cache"] == cache for each in skipped)
        if runs or missed:
            rows.append(_row(name, cache, about["ours"], runs, missed))
    return data, rows


def _row(name: str, cache: str, ours: bool, runs: list[dict[str, Any]], skipped: int) -> Row:
    good = [run for run in runs if not run["log_tail"]]
    # Of pictures that come in batches, single intervals say nothing.
    single = [run for run in good if run["intervals"] and max(run.get("batch_sizes") or [1]) == 1]

    def of(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> Spread | None:
        return Spread.of([v for v in map(value, runs) if v is not None])

    phases = [phases_of(run) for run in good if run["readings"]]
    return Row(
        variant=name,
        cache=cache,
        ours=ours,
        engine=next((run["readings"].get("engine") for run in good), None),
        first_png=of(good, lambda run: run["first_png_seconds"]),
        seconds_per_image=of(good, lambda run: seconds_a_picture(run["intervals"], run.get("batch_sizes", ()))),
        p95=of(single, lambda run: percentile(run["intervals"], 0.95)),
        jitter=of(single, lambda run: statistics.pstdev(run["intervals"])),
        busy=of(good, lambda run: run.get("busy_percent")),
        largest_batch=max((size for run in good for size in run.get("batch_sizes", ())), default=1),
        encoder=_loads_encoder(good),
        peak_allocated=of(good, lambda run: run["readings"].get("memory", {}).get("peak_allocated_gb")),
        peak_reserved=of(good, lambda run: run["readings"].get("memory", {}).get("peak_reserved_gb")),
        peak_device=of(good, lambda run: run.get("peak_device_gb")),
        phases={p: statistics.median(each[p] for each in phases) for p in PHASES} if phases else {},
        failures=[reason(run) for run in runs if run["log_tail"]],
        skipped=skipped,
    )


def _loads_encoder(runs: list[dict[str, Any]]) -> bool | None:
    """engine=native has a phase for each network that it loads."""
    told = [run["readings"]["phases"] for run in runs if run["readings"].get("engine") == "native"]
    return any("text_encoder" in phases for phases in told) if told else None


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


def reason(run: dict[str, Any]) -> str:
    """Why a process failed: how it ended, and what it said last of an error."""
    return f"{run.get('failure') or 'exit ' + str(run['returncode'])}: {last_error(run['log_tail'])}"
