"""Fresh processes, timed from the outside: contestants in turn, several rounds, within a budget of seconds.

Every picture's time is that of its file being complete on disk (for this runner the moment it got its final name),
counted from the start of the process, imports included. The same rule for everyone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from benchmarks import machine
from benchmarks.device_memory import PeakDeviceMemory
from benchmarks.variants import Variant, Work, readings

LOG_TAIL = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A comparison."""

    name: str
    title: str
    prediction: str
    """Written before the first run."""
    variants: Sequence[Variant]
    """Most important first: what the budget does not reach is what matters least."""
    work: Work
    rounds: int = 3
    caches: Sequence[str] = ("warm",)
    """Page cache before each process: warm, dropped."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One process."""

    variant: str
    cache: str
    round: int
    returncode: int
    wall_seconds: float
    first_png_seconds: float | None = None
    """Process start to the first picture complete on disk."""
    intervals: list[float] = field(default_factory=list)
    """Seconds between consecutive pictures."""
    peak_device_gb: float | None = None
    """Most GPU memory in use, by the driver's count; None where it cannot be read."""
    readings: dict[str, Any] = field(default_factory=dict)
    log_tail: str = ""
    """The end of its output, when it failed."""


class Results:
    """A scenario's JSON file, rewritten after every process, so that partial results are kept."""

    def __init__(self, scenario: Scenario, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: list[Run] = []
        work = asdict(scenario.work) | {"model": scenario.work.model.name}
        self._head = {
            "scenario": scenario.name,
            "title": scenario.title,
            "prediction": scenario.prediction,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": dict(facts),
            "work": work,
            "variants": {v.name: _variant(v) for v in scenario.variants},
        }

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        value = self._head | {"runs": [asdict(run) for run in self.runs]}
        self.path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _variant(variant: Variant) -> dict[str, Any]:
    shown = {"ours": variant.is_ours, "env": variant.env}
    return shown | ({"script": variant.script} if variant.script else {"overrides": list(variant.overrides or ())})


class Budget:
    """Seconds left for a scenario."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def allows(self, key: str) -> bool:
        """True when a process like the last of this kind would still end in time; at first any is tried."""
        return self.left > self._longest.get(key, 0.0) * 1.05

    def took(self, key: str, seconds: float) -> None:
        self._longest[key] = max(seconds, self._longest.get(key, 0.0))


def measure(scenario: Scenario, results: Results, seconds: float, models: Mapping[str, Path]) -> None:
    """Run the scenario's rounds until they are done or the budget is spent."""
    budget = Budget(seconds)
    for cache in scenario.caches:
        if cache == "warm":
            for name in {v.uses_model for v in scenario.variants}:
                machine.fill_page_cache(models[name])
        for variant in (v for v in scenario.variants if v.primed and budget.allows(v.name)):
            run_once(scenario, variant, cache, -1, budget.left, models)
        for number in range(scenario.rounds):
            # Every other round backwards, so that a drift of the machine meets all of them alike.
            for variant in in_turn(scenario.variants, number):
                key = f"{cache} {variant.name}"
                if not budget.allows(key):
                    continue
                started = time.monotonic()
                run = run_once(scenario, variant, cache, number, budget.left, models)
                budget.took(key, time.monotonic() - started)
                results.add(run)
                print(_line(run), flush=True)


def in_turn(variants: Sequence[Variant], number: int) -> Iterable[Variant]:
    return variants if number % 2 == 0 else list(reversed(variants))


def run_once(
    scenario: Scenario, variant: Variant, cache: str, number: int, timeout: float, models: Mapping[str, Path]
) -> Run:
    """One process of one contestant."""
    if cache == "dropped" and not machine.drop_page_cache():
        raise SystemExit("cannot drop the page cache: run as root, or leave out --cache dropped")
    work = scenario.work
    images = work.images if variant.images is None else min(variant.images, work.images)
    work = Work(model=models[variant.uses_model], images=images, size=work.size, steps=work.steps, device=work.device)
    out = Path(tempfile.mkdtemp(prefix="bench_"))
    log = out / "log.txt"
    try:
        command, environment = variant.command(work, out), variant.environment()
        memory = PeakDeviceMemory()
        began, clock = time.time(), time.perf_counter()
        with log.open("wb") as stream, memory:
            code = _wait(start(command, stream, environment), timeout)
        wall = time.perf_counter() - clock
        times = sorted(path.stat().st_ctime - began for path in out.rglob("*.png"))
        failed = code != 0 or len(times) < images
        return Run(
            variant=variant.name, cache=cache, round=number, returncode=code, wall_seconds=wall,
            first_png_seconds=times[0] if times else None,
            intervals=[b - a for a, b in itertools.pairwise(times)],
            peak_device_gb=memory.peak_gb,
            readings=readings(variant, out),
            log_tail=(log.read_text(errors="replace")[-LOG_TAIL:] or "no output") if failed else "",
        )  # fmt: skip
    finally:
        shutil.rmtree(out, ignore_errors=True)


def start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The process, in a group of its own, so that its compiler workers can be ended with it."""
    return subprocess.Popen(command, stdout=log, stderr=log, env=dict(environment), start_new_session=True)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int:
    try:
        return process.wait(timeout=max(timeout, 1.0))
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def median(values: Sequence[float]) -> float:
    """Median, NaN for none."""
    return statistics.median(values) if values else float("nan")


def _line(run: Run) -> str:
    first = f"{run.first_png_seconds:7.2f}" if run.first_png_seconds is not None else "      -"
    later = f"{statistics.mean(run.intervals):6.3f}" if run.intervals else "     -"
    memory = run.peak_device_gb or run.readings.get("memory", {}).get("peak_allocated_gb")
    shown = f"{memory:5.1f} GB" if memory else ""
    note = f"  FAILED ({run.returncode}): {run.log_tail.strip().splitlines()[-1:]}" if run.log_tail else ""
    return f"{run.cache:8}{run.round} {run.variant:32} first {first} s  later {later} s  {shown}{note}"
