"""What a job of a multirun costs beside its picture: milliseconds of CPU time of the main thread.

    python benchmarks/sweep_overhead.py [--jobs 20] [--output FILE]

A multirun of the embedded model draws one picture a job. Composing, planning, writing settings and reporting count;
generating does not. While a GPU draws, all of it is hidden behind the picture of the job before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from zimage_runner.cli.main import main as run
from zimage_runner.cli.sweep.launcher import WarmLauncher
from zimage_runner.session import Session


def main() -> int:
    parser = argparse.ArgumentParser(description="milliseconds a job of a multirun costs beside its picture")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    result = {"jobs": args.jobs, "milliseconds": measure(args.jobs)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(jobs: int) -> dict[str, float]:
    """Median and least milliseconds a job, the first one left out."""
    with (
        tempfile.TemporaryDirectory() as folder,
        timed(WarmLauncher, "_compose") as composing,
        timed(WarmLauncher, "_run") as running,
        timed(Session, "generate") as generating,
    ):
        seeds = ",".join(str(seed) for seed in range(jobs))
        code = run(
            ["-m", "prompt=a red apple", f"seeds={seeds}", "sampling.num_inference_steps=1", "output.fsync=never",
             f"output.root={folder}", "hydra.callbacks.sweep_report.grid=false"]
        )  # fmt: skip
    if code != 0:
        raise RuntimeError(f"the multirun ended with {code}")
    each = [c + r - g for c, r, g in zip(composing, running, generating, strict=True)][1:]
    return {"median": 1e3 * statistics.median(each), "min": 1e3 * min(each)}


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of CPU time that this thread spends in each call of a method."""
    real, seconds = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        started = time.thread_time()
        try:
            return real(*args, **options)
        finally:
            seconds.append(time.thread_time() - started)

    with mock.patch.object(owner, name, call):
        yield seconds


if __name__ == "__main__":
    sys.exit(main())
