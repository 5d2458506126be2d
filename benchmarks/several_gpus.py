"""Pictures a second on 1, 2, 4 ... GPUs: with executor=ray, and with one process for each GPU (prompts.shard).

    python -m benchmarks.several_gpus [--counts 1 2 4 8] [--pictures-each 40] [--kill] [--out FILE] [overrides ...]
    python -m benchmarks.several_gpus --cpu --counts 1 2            # try it out: the embedded model on the CPU
    python -m benchmarks.several_gpus --plot FILE                   # draw benchmarks/plots/several_gpus.svg

Each way draws ``pictures-each`` pictures a GPU, as PNG. Steady: the middle of the run, from the moment at which a
quarter of the pictures are done until seven eighths are, when all GPUs draw. Whole: pictures divided by the seconds of
the whole command, start and loading included. First pictures: of each GPU, seconds from the start of the command.
Driver: CPU seconds of the run's own process in each second of the steady part. Host memory: what the machine had in use
more than before, at most. ``--kill`` ends one of Ray's workers with kill -9 in the middle of another run of the largest
count: each picture must be in the ledger once. Rows are added to those that FILE holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.variants import HERE

ON_CPU = ("model=zimage_nano", "executor.num_cpus=1", "executor.object_store_gb=0.1")
STEADY = 0.25, 0.875
PREDICTION = (
    "Expected, two GPUs: nothing is shared but the page cache, the host's cores and the one process that encodes PNGs "
    "(0.05 s of a core a picture): 1.98x with a process for each GPU, 1.97x with Ray, in bf16 and in fp8. With one GPU "
    "Ray draws as fast as one process within 1 %; its first picture comes 4 s later, for Ray starts its own processes "
    "and then a worker that imports torch. The driver takes 8 % of a core for each GPU in bf16, 12 % in fp8."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs")
    parser.add_argument("--pictures-each", type=int, default=40, help="pictures for each GPU")
    parser.add_argument("--cpu", action="store_true", help="the embedded model, one core for each worker")
    parser.add_argument("--kill", action="store_true", help="a run more, in which a worker is killed")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw nothing new: make the plot of such a file")
    parser.add_argument("overrides", nargs="*", default=[])
    chosen = parser.parse_args()
    if chosen.plot:
        plot(json.loads(chosen.plot.read_text(encoding="utf-8"))["rows"], HERE / "plots" / "several_gpus.svg")
        return 0
    print(f"{'GPUs':>4}  {'way':<10} {'steady images/s':>16} {'whole images/s':>15} {'whole s':>9}  first pictures, s")
    jobs = [(way, count, False) for count in chosen.counts for way in ("ray", "processes")]
    for way, count, kill in [*jobs, *([("ray", max(chosen.counts), True)] if chosen.kill else [])]:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(way, count, chosen, Path(folder), kill)
        firsts = " ".join(f"{seconds:.1f}" for seconds in row["first_pictures"])
        print(
            f"{count:>4}  {way:<10} {row['steady']:>16.3f} {row['whole']:>15.3f} {row['seconds']:>9.1f}  {firsts}"
            f"  {row.get('killed', '')}",
            flush=True,
        )
        if chosen.out:
            keep(chosen.out, row)
    return 0


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file."""
    empty = {"prediction": PREDICTION, "machine": machine.facts(None), "rows": []}
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    result["rows"].append(row)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(way: str, count: int, chosen: argparse.Namespace, folder: Path, kill: bool) -> dict[str, Any]:
    """Draw once in this way. Return its figures."""
    pictures = count * chosen.pictures_each
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat with {n} hats\n" for n in range(pictures)), encoding="utf-8")
    common = ["prompts=text_file", f"prompts.path={prompts}", "seeds=[1]", "output.report=false", *chosen.overrides]
    before, began, clock = host_memory_gb(), time.time(), time.perf_counter()
    if way == "ray":
        options = ["executor=ray", f"executor.workers={count}", *(ON_CPU if chosen.cpu else [])]
        runs = [start([*common, *options], folder / "run", {"BENCH_RUN": str(folder)})]
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
    watch = Watch([run.pid for run in runs])
    killed = kill_one(folder, pictures // 2) if kill else None
    failed = [run.returncode for run in runs if run.wait()]
    seconds = time.perf_counter() - clock
    watch.end()
    if failed:
        sys.exit(
            f"{way} with {count}: exit codes {failed}\n"
            + "".join(p.read_text(encoding="utf-8")[-2000:] for p in folder.glob("*.log"))
        )
    ledgers = [ledger.read_text(encoding="utf-8").splitlines() for ledger in sorted(folder.glob("run*/records.jsonl"))]
    lines = [json.loads(line) for ledger in ledgers for line in ledger]
    drawn = Counter((line["item"], line["index"]) for line in lines if line["status"] == "ok")
    if len(drawn) != pictures or max(drawn.values()) > 1:
        sys.exit(
            f"{way} with {count}: {len(drawn)} pictures instead of {pictures}, at most {max(drawn.values())} times"
        )
    times = sorted(time_of(line) for line in lines)
    first, last = (int(share * pictures) for share in STEADY)
    summary = json.loads((folder / "run" / "summary.json").read_bytes()) if way == "ray" else None
    if summary:
        since = [worker["first_image_seconds"] for worker in summary["session"]["executor"]["workers"]]
        offset = times[0] - began - min(seconds for seconds in since if seconds is not None)
        firsts = [offset + seconds for seconds in since if seconds is not None]
    else:
        firsts = [min(time_of(json.loads(line)) for line in ledger) - began for ledger in ledgers]
    return {
        "gpus": count, "way": way, "overrides": chosen.overrides, "pictures": pictures,
        "steady": (last - first) / (times[last] - times[first]),
        "whole": pictures / seconds, "seconds": seconds, "first_pictures": firsts,
        "driver_cpu": watch.cpu_between(times[first], times[last]), "host_gb": watch.most_gb - before,
        **({"workers": summary["session"]["executor"]["workers"]} if summary else {}),
        **({"killed": killed, "restarts": summary["session"]["executor"]["restarts"]} if summary and kill else {}),
    }  # fmt: skip


def start(words: list[str], run: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(f"{run}.log", "wb") as log:
        command = [sys.executable, "-m", "zimage_runner", *words, f"hydra.run.dir={run}", f"output.root={run.parent}"]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)


def kill_one(folder: Path, after: int) -> str:
    """Kill a worker of Ray once so many pictures are in this run's ledger. Return what was done."""
    ledger, mark = folder / "run" / "records.jsonl", f"BENCH_RUN={folder}".encode()
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < after:
        time.sleep(0.02)
    workers = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::Drawer" in content(path)]
    found = [int(path.name) for path in workers if mark in content(path / "environ")]
    os.kill(found[0], signal.SIGKILL)
    return f"one of {len(found)} workers was killed after {after} pictures"


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


class Watch:
    """CPU seconds of some processes, and the host's memory in use, every tenth of a second."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._cpu: list[tuple[float, float]] = []
        self.most_gb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(pids,), daemon=True)
        self._thread.start()

    def _watch(self, pids: Sequence[int]) -> None:
        while not self._over.wait(0.1):
            self.most_gb = max(self.most_gb, host_memory_gb())
            self._cpu.append((time.time(), sum(machine.cpu_seconds(pid) for pid in pids)))

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def cpu_between(self, first: float, last: float) -> float:
        """CPU seconds a second between two times."""
        inside = [(at, cpu) for at, cpu in self._cpu if first <= at <= last]
        if len(inside) < 2:
            return 0.0
        (begin, before), (end, after) = inside[0], inside[-1]
        return (after - before) / (end - begin)


def host_memory_gb() -> float:
    """Memory in use, page cache left out, in GB."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    total, available = (int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return (total - available) * 1024 / 1e9


def time_of(line: dict[str, Any]) -> float:
    """When an item was written, in seconds."""
    return datetime.fromisoformat(line["written"]).timestamp()


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Steady images a second against GPUs, a line for each way and options; dotted, what one GPU promises."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    kept = sorted((row for row in rows if "killed" not in row), key=label)
    for name, group in itertools.groupby(kept, key=label):
        points = sorted((row["gpus"], row["steady"]) for row in group)
        style = "o" if name.startswith("ray") else "s"  # they hardly differ: one within the other
        (line,) = axes.plot(*zip(*points), style, label=name, markersize=5 if style == "o" else 10, fillstyle="none")
        slope = points[0][1] / points[0][0]
        axes.plot([0, points[-1][0]], [0, slope * points[-1][0]], ":", color=line.get_color())
    axes.set_xlabel("GPUs")
    axes.set_ylabel("1024x1024 images a second")
    axes.set_xticks(sorted({row["gpus"] for row in kept}))
    axes.legend(fontsize=8)
    plt.rcParams["svg.hashsalt"] = path.stem  # the same figures give the same file
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def label(row: dict[str, Any]) -> str:
    precision = next(
        (word.partition("=")[2] for word in row["overrides"] if word.startswith("engine.precision")), "bf16"
    )
    return f"{row['way']}, {precision}"


if __name__ == "__main__":
    sys.exit(main())
