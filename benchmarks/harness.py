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
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from benchmarks import machine
from benchmarks.device_memory import DeviceUse, describe_gpu
from benchmarks.readings import pictures, readings
from benchmarks.variants import Variant, Work

LOG_TAIL = 1500
BUSY_AFTER, BUSY_BEFORE_END = 1.0, 0.3
"""Seconds after the first batch and before the last picture that do not count for how busy the GPU was: the driver's
reading lags, and the last file is written after the GPU has finished."""


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
    settles: bool = False
    """Run the first contestant once uncounted: the first process on a machine was seen to take 10 s more."""

    def rounds_of(self, variant: Variant) -> int:
        """Processes of this contestant under each state of the page cache."""
        return self.rounds if variant.rounds is None else min(variant.rounds, self.rounds)


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
    batch_sizes: list[int] = field(default_factory=list)
    """How many pictures were drawn together with each, in the order in which they were complete."""
    busy_percent: float | None = None
    """Share of the time after the first batch in which the GPU ran any kernel, as the driver samples it."""
    peak_device_gb: float | None = None
    """Most GPU memory in use, by the driver's count; None where it cannot be read."""
    readings: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    """What was wrong with it, in a line."""
    log_tail: str = ""
    """The end of its output, when it failed."""


class Results:
    """A scenario's JSON file, rewritten after every process, so that partial results are kept."""

    def __init__(self, scenario: Scenario, path: Path, facts: Mapping[str, Any], note: str = "") -> None:
        """``note``: what a reader of the figures should know, such as what else ran on the machine."""
        self.path = path
        self.runs: list[Run] = []
        self.skipped: list[dict[str, Any]] = []
        """Processes for which no time was left: variant, cache, round."""
        work = asdict(scenario.work) | {"model": scenario.work.model.name}
        self._head = {
            "scenario": scenario.name,
            "title": scenario.title,
            "prediction": scenario.prediction,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": dict(facts),
            "gpu": describe_gpu() if scenario.work.device == "cuda" else None,
            "note": note,
            "work": work,
            "variants": {v.name: _variant(v) for v in scenario.variants},
        }

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.write()

    def skip(self, variant: str, cache: str, number: int) -> None:
        """Note a process that was not started."""
        self.skipped.append({"variant": variant, "cache": cache, "round": number})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        value = self._head | {"runs": [asdict(run) for run in self.runs], "skipped": self.skipped}
        self.path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _variant(variant: Variant) -> dict[str, Any]:
    shown: dict[str, Any] = {"ours": variant.is_ours, "env": variant.env}
    if variant.keeps:
        shown |= {"keeps": variant.keeps, "starts_empty": variant.starts_empty}
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
        """True when a process like the longest of this kind would still end in time, or none ran yet."""
        return self.left > self._longest.get(key, 0.0) * 1.05

    def took(self, key: str, seconds: float) -> None:
        self._longest[key] = max(seconds, self._longest.get(key, 0.0))


def measure(scenario: Scenario, results: Results, seconds: float) -> None:
    """Run the scenario's rounds until they are done or the budget is spent."""
    budget = Budget(seconds)
    with tempfile.TemporaryDirectory(prefix="bench_kept_") as folder:
        kept = Path(folder)
        for cache in scenario.caches:
            if cache == "warm":
                machine.fill_page_cache(scenario.work.model, libraries=scenario.work.device == "cuda")
                if scenario.settles:
                    _run_uncounted(scenario, scenario.variants[0], budget, kept)
            for number in range(scenario.rounds):
                # Every other round backwards, so that a drift of the machine meets all of them alike.
                for variant in in_turn(scenario.variants, number):
                    if number < scenario.rounds_of(variant) and cache in variant.caches:
                        _turn(scenario, variant, cache, number, results, budget, kept)


def _turn(
    scenario: Scenario, variant: Variant, cache: str, number: int, results: Results, budget: Budget, kept: Path
) -> None:
    """One contestant's process of one round, if there is time for it."""
    key = f"{cache} {variant.name}"
    priming = variant.primed and not all(_is_filled(path) for path in variant.folders(kept))
    if not budget.allows(key):
        results.skip(variant.name, cache, number)
        print(f"{cache:8}{number} {variant.name:45} no time left", flush=True)
        return
    if priming:
        _run_uncounted(scenario, variant, budget, kept)
    started = time.monotonic()
    run = run_once(scenario, variant, cache, number, budget.left, kept)
    budget.took(key, time.monotonic() - started)
    results.add(run)
    print(line(run), flush=True)


def _run_uncounted(scenario: Scenario, variant: Variant, budget: Budget, kept: Path) -> None:
    print(f"{line(run_once(scenario, variant, 'warm', -1, budget.left, kept))}  (uncounted)", flush=True)


def _is_filled(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def in_turn(variants: Sequence[Variant], number: int) -> Iterable[Variant]:
    return variants if number % 2 == 0 else list(reversed(variants))


def run_once(
    scenario: Scenario, variant: Variant, cache: str, number: int, timeout: float, kept: Path | None = None
) -> Run:
    """One process of one contestant; ``kept`` holds what outlives it (by default nothing does)."""
    work = replace(scenario.work, images=variant.images or scenario.work.images)
    images = work.images
    out = Path(tempfile.mkdtemp(prefix="bench_"))
    log = out / "log.txt"
    try:
        if variant.starts_empty:
            for folder in variant.folders(kept or out):
                shutil.rmtree(folder, ignore_errors=True)
        if cache == "dropped" and not machine.drop_page_cache():
            raise SystemExit("cannot drop the page cache: run as root, or leave out --cache dropped")
        command, environment = variant.command(work, out, kept), variant.environment(kept)
        use = DeviceUse(environment)
        began, clock = time.time(), time.perf_counter()
        with log.open("wb") as stream, use:
            code = _wait(start(command, stream, environment), timeout)
        wall = time.perf_counter() - clock
        drawn = pictures(variant, out)
        times = drawn.times
        failure = why_failed(code, len(times), images, wall, timeout)
        busy = (times[drawn.first_batch - 1] + BUSY_AFTER, times[-1] - BUSY_BEFORE_END) if times else (0.0, 0.0)
        return Run(
            variant=variant.name, cache=cache, round=number, returncode=code, wall_seconds=wall,
            first_png_seconds=times[0] - began if times else None,
            intervals=[b - a for a, b in itertools.pairwise(times)],
            batch_sizes=drawn.batch_sizes,
            busy_percent=use.busy_percent(*busy),
            peak_device_gb=use.peak_gb,
            readings=readings(variant, out),
            failure=failure,
            log_tail=(log.read_text(errors="replace", encoding="utf-8")[-LOG_TAIL:] or "no output") if failure else "",
        )  # fmt: skip
    finally:
        shutil.rmtree(out, ignore_errors=True)


def why_failed(code: int, drawn: int, wanted: int, wall: float, timeout: float) -> str:
    """What was wrong with a process, in a line; empty when it drew everything."""
    if code == -signal.SIGKILL and wall >= timeout:
        return f"ended after {wall:.0f} s, when the scenario's time was spent, with {drawn} of {wanted} pictures"
    if code < 0:
        return f"ended by {signal.Signals(-code).name} with {drawn} of {wanted} pictures"
    if code or drawn < wanted:
        return f"exit {code} with {drawn} of {wanted} pictures"
    return ""


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


def seconds_a_picture(intervals: Sequence[float], batch_sizes: Sequence[int] = ()) -> float | None:
    """Time from the end of the first batch to the last picture, for each picture after that batch; None without any.

    Pictures of a batch come together: the mean of all intervals would give the first batch's pictures away.
    """
    first_batch = batch_sizes[0] if batch_sizes else 1
    after = intervals[first_batch - 1 :]
    return sum(after) / len(after) if after else None


def last_error(log: str) -> str:
    """What a process said last of an error, or last of anything."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "failed:" in line.lower()]
    return (errors or lines or ["no output"])[-1][:200]


def line(run: Run) -> str:
    """A process in a line of the log."""
    first = f"{run.first_png_seconds:7.2f}" if run.first_png_seconds is not None else "      -"
    each = seconds_a_picture(run.intervals, run.batch_sizes)
    later = f"{each:6.3f}" if each is not None else "     -"
    memory = run.peak_device_gb or run.readings.get("memory", {}).get("peak_allocated_gb")
    shown = f"{memory:5.1f} GB" if memory else ""
    busy = f"  busy {run.busy_percent:.0f} %" if run.busy_percent is not None else ""
    note = f"  FAILED: {run.failure}: {last_error(run.log_tail)}" if run.failure else ""
    wall = f"  wall {run.wall_seconds:6.1f} s"
    return f"{run.cache:8}{run.round:2} {run.variant:45} first {first} s  later {later} s  {shown}{busy}{wall}{note}"
