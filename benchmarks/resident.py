"""Seconds of a whole command with executor=resident, from its start to its end, beside executor=inline.

    python -m benchmarks.resident [--rounds 10] [--output FILE] [word ...]

Words are those of a run; without any it draws one picture with the embedded model. The resident process is started, and
has drawn once, before anything is timed; then the executors take turns, so that what else the machine does meets both.
``cpu_seconds`` are those of the command's own process and of the resident one. ``picture_seconds`` is what the run
itself says of drawing and writing. The load is the system's average of the last minute; ``nice`` is the priority that
all of it had, below 0 before the machine's other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

NANO = ("model=zimage_nano", "prompt=a cat", "output.min_free_gb=0")
EXECUTORS = ("resident", "inline")


def main() -> int:
    parser = argparse.ArgumentParser(description="the second command")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.words or NANO, args.rounds, Path(folder))
    machine.report(result, args.output)
    return 0


def measure(words: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Times of ``rounds`` commands of each executor, in turn."""
    environment = {"ZIMAGE_RUNNER_CACHE": str(folder / "cache"), **os.environ}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in EXECUTORS}
    loads = [os.getloadavg()[0]]
    first = command("resident", words, folder, environment)
    command("inline", words, folder, environment)
    try:
        for _ in range(rounds):
            for name in EXECUTORS:
                taken[name].append(command(name, words, folder, environment))
            loads.append(os.getloadavg()[0])
    finally:
        subprocess.run([sys.executable, "-m", "zimage_runner", "resident", "stop"], env=environment, check=True)
    return {
        "words": list(words),
        "rounds": rounds,
        "cpus": len(os.sched_getaffinity(0)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "load_of_the_machine": {"least": min(loads), "most": max(loads)},
        "first_command_seconds": first["seconds"],
        **{name: {key: spread([one[key] for one in taken[name]]) for key in taken[name][0]} for name in EXECUTORS},
    }


def command(executor: str, words: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """One command: seconds of all of it, of its process' CPU time, and of drawing and writing."""
    run = folder / f"run{len(list(folder.glob('run*')))}"
    pid = resident_process(environment) if executor == "resident" else None
    argv = [sys.executable, "-m", "zimage_runner", *words, f"executor={executor}", f"hydra.run.dir={run}"]
    before = cpu_seconds(pid)
    began = time.perf_counter()
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    summary = json.loads((run / "summary.json").read_bytes())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds(pid) - before, "picture_seconds": summary["total_seconds"]}


def resident_process(environment: dict[str, str]) -> int | None:
    """Its number; None where there is none yet."""
    argv = [sys.executable, "-m", "zimage_runner", "resident", "status"]
    line = subprocess.run(argv, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
    return int(line.split()[1].rstrip(",")) if line.startswith("process ") else None


def cpu_seconds(pid: int | None) -> float:
    """CPU time of all ended children, and of a process that goes on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    return seconds + (machine.cpu_seconds(pid) if pid is not None else 0.0)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most."""
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


if __name__ == "__main__":
    sys.exit(main())
