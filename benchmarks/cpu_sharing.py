"""The embedded model on a CPU that processes share: one process alone, two at once, and how OpenMP's threads wait.

    python -m benchmarks.cpu_sharing [--rounds 12] [--seconds 2] [--threads N] [--output FILE]

Each way of waiting has two processes, which stay loaded and asleep. In each round, each way draws for some seconds with
one process and then with both: a machine that is busy with other things disturbs all alike, and ratios are medians over
rounds. The seconds of CPU (user and system) of a picture are given too: threads that spin burn them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

WAYS: dict[str, dict[str, str]] = {
    "runner": {},  # as a process of the runner begins
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what torch's OpenMP (libgomp) does by itself
    "brief": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
PREDICTION = (
    "Expected: alone, brief and passive waiting are as fast as spinning within 5 %; two passive processes on two cores "
    "draw at least as many pictures as one, two spinning ones several times fewer."
)


def main() -> int:
    parser = argparse.ArgumentParser(description="processes that share a CPU, embedded model")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.0, help="of drawing, for each way, alone and together")
    parser.add_argument("--threads", default="null", help="engine.threads; null is torch's own choice")
    parser.add_argument("--ways", default=",".join(WAYS), help="of waiting, to be compared")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--draws", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draws:
        return draw_when_told(args.threads)
    ways = args.ways.split(",")
    painters = {way: [Painter(way, args.threads) for _ in range(2)] for way in ways}
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    load = [os.getloadavg()[0]]
    try:
        for number in range(args.rounds):
            for way in sorted(ways, reverse=number % 2 == 1):
                rows[way].append(round_of(painters[way], args.seconds))
            load.append(os.getloadavg()[0])
    finally:
        for painter in (painter for pair in painters.values() for painter in pair):
            painter.close()
    result = {
        "prediction": PREDICTION,
        "machine": machine.describe(),
        "rounds": args.rounds,
        "seconds": args.seconds,
        "threads": args.threads,
        "load_average": {"before": load[0], "highest": max(load)},
        "ways": {way: summary(rows[way], rows[ways[0]]) for way in ways},
    }
    machine.report(result, args.output)
    return 0


class Painter:
    """A process that has the model loaded, and draws when it is told to."""

    def __init__(self, way: str, threads: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu_sharing", "--draws", "--threads", threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | WAYS[way],
            encoding="utf-8",
        )
        self.result()  # it is ready

    def begin(self, seconds: float) -> None:
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)

    def result(self) -> dict[str, float]:
        """What it did: pictures, their seconds, and the CPU's seconds."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def draw_when_told(threads: str) -> int:
    """Life of a painter: seconds come in, a line a turn; results go out."""
    from zimage_runner.startup.process import begin

    begin()
    from benchmarks.variants import composed
    from zimage_runner.runner.spec import plan_run
    from zimage_runner.session import Session

    words = ["+experiment=quickstart", "engine=native", "engine.device=cpu", f"engine.threads={threads}"]
    spec = plan_run(composed(*words, "warmup=generate"))
    session = Session(spec.session, spec.shapes, spec.texts)
    session.start()
    print("{}", flush=True)
    for line in sys.stdin:
        began, used, pictures = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() - began < float(line):
            session.generate([spec.plan.items[pictures % len(spec.plan)]]).images.wait()
            pictures += 1
        took = {"pictures": pictures, "wall": time.perf_counter() - began, "cpu": cpu_seconds() - used}
        print(json.dumps(took), flush=True)
    return 0


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def round_of(pair: list[Painter], seconds: float) -> dict[str, float]:
    """Pictures per second of one process alone and of both together, and CPU seconds of a picture."""
    found: dict[str, float] = {}
    for name, painters in (("alone", pair[:1]), ("together", pair)):
        for painter in painters:
            painter.begin(seconds)
        results = [painter.result() for painter in painters]
        found[name] = sum(result["pictures"] / result["wall"] for result in results)
        found[f"{name}_cpu"] = sum(result["cpu"] for result in results) / sum(result["pictures"] for result in results)
    return found


def summary(rows: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds; ratios are medians of each round's own."""
    medians = {f"{name}_per_s": statistics.median(row[name] for row in rows) for name in ("alone", "together")}
    cpu = {f"{name}_cpu_s": statistics.median(row[f"{name}_cpu"] for row in rows) for name in ("alone", "together")}
    return {
        **medians,
        **cpu,
        "best_alone_per_s": max(row["alone"] for row in rows),
        "best_together_per_s": max(row["together"] for row in rows),
        "together_by_alone": statistics.median(row["together"] / row["alone"] for row in rows),
        "alone_by_first": statistics.median(row["alone"] / other["alone"] for row, other in zip(rows, first)),
    }


if __name__ == "__main__":
    sys.exit(main())
