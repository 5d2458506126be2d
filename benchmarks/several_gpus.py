"""Pictures a second on 1, 2, 4 ... GPUs: with executor=ray, and with one process for each GPU (prompts.shard).

    python -m benchmarks.several_gpus [--counts 1 2 4 8] [--pictures-each 24] [--out results.json] [overrides ...]
    python -m benchmarks.several_gpus --cpu --counts 1 2            # try it out: the embedded model on the CPU

Each way draws ``pictures-each`` pictures a GPU. Steady: pictures of all, divided by the time from the first to the last
of them. Whole: pictures divided by the seconds of the whole command, start and loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ON_CPU = ("model=zimage_nano", "executor.num_cpus=1", "executor.object_store_gb=0.1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs")
    parser.add_argument("--pictures-each", type=int, default=24, help="pictures for each GPU")
    parser.add_argument("--cpu", action="store_true", help="the embedded model, one core for each worker")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("overrides", nargs="*", default=[])
    chosen = parser.parse_args()
    rows = []
    print(f"{'GPUs':>4}  {'way':<10} {'steady images/s':>16} {'whole images/s':>15} {'whole s':>9}")
    for count in chosen.counts:
        for way in ("ray", "processes"):
            with tempfile.TemporaryDirectory() as folder:
                row = measure(way, count, chosen, Path(folder))
            rows.append(row)
            print(
                f"{count:>4}  {way:<10} {row['steady']:>16.3f} {row['whole']:>15.3f} {row['seconds']:>9.1f}", flush=True
            )
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(way: str, count: int, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Draw once in this way. Return its figures."""
    pictures = count * chosen.pictures_each
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat with {n} hats\n" for n in range(pictures)))
    common = ["prompts=text_file", f"prompts.path={prompts}", "seeds=[1]", "output.report=false", *chosen.overrides]
    began = time.perf_counter()
    if way == "ray":
        options = ["executor=ray", f"executor.workers={count}", *(ON_CPU if chosen.cpu else [])]
        runs = [start([*common, *options], folder / "run", {})]
    else:
        model = ["model=zimage_nano"] if chosen.cpu else []
        runs = [
            start(
                [*common, *model, f"prompts.shard={n + 1}/{count}"],
                folder / f"run{n}",
                {"OMP_NUM_THREADS": "1"} if chosen.cpu else {"CUDA_VISIBLE_DEVICES": str(n)},
            )
            for n in range(count)
        ]
    failed = [run.returncode for run in runs if run.wait()]
    seconds = time.perf_counter() - began
    if failed:
        sys.exit(
            f"{way} with {count}: exit codes {failed}\n" + "".join(p.read_text()[-2000:] for p in folder.glob("*.log"))
        )
    times = sorted(time_of(line) for ledger in folder.glob("run*/records.jsonl") for line in ledger.open())
    if len(times) != pictures:
        sys.exit(f"{way} with {count}: {len(times)} pictures instead of {pictures}")
    steady = (pictures - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 0.0
    return {"gpus": count, "way": way, "pictures": pictures, "steady": steady, "whole": pictures / seconds,
            "seconds": seconds}  # fmt: skip


def start(words: list[str], run: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(f"{run}.log", "wb") as log:
        command = [sys.executable, "-m", "zimage_runner", *words, f"hydra.run.dir={run}", f"output.root={run.parent}"]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)


def time_of(line: str) -> float:
    """When an item was written, in seconds."""
    return datetime.fromisoformat(json.loads(line)["written"]).timestamp()


if __name__ == "__main__":
    sys.exit(main())
