"""How large a run the gallery can show: time and memory on ledgers made for it.

    python benchmarks/gallery.py [pictures=100000,1000000] [drawn=1500] [into=results.json]

For each size a run of that many pictures (prompts and ledger, no picture files; a new prompt for each picture) is made
in a temporary folder, and a gallery of it is started as a user does, first without an index, then again with it.
Measured: from the start of the process to its address, from there to the first page of 100 pictures with the newest
first, the time until every line is in the index, filters, a jump to the middle, and the process's largest memory.

Then what a viewer costs a run: the embedded model draws ``drawn`` pictures, and a gallery follows it with a client that
takes its events and asks for each new thumbnail; every few seconds the gallery's process is stopped or goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.made_runs import many_lines  # noqa: E402

FILTERS = {
    "text": "q=fox+watercolour",
    "text without a match": "q=zeppelin",
    "parameter": "q=width%3D768",
    "seed": "q=seed%3D0",
    "text and parameter": "q=lighthouse+width%3D768+steps%3E4",
    "slowest first": "sort=slowest",
}
REPEATS = 3
WINDOW_SECONDS = 4.0
SETTLED_SECONDS = 1.0
"""After a switch, before a picture counts."""


def main(argv: list[str]) -> int:
    options = dict(word.split("=", 1) for word in argv)
    sizes = [int(size) for size in options.get("pictures", "100000,1000000").split(",")]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "runs": [],
    }
    for size in sizes:
        if not size:
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "outputs"
            many_lines(root / "big" / "run", size)
            environment = {**os.environ, "ZIMAGE_RUNNER_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
            result: dict[str, Any] = {
                "pictures": size,
                "ledger_mb": round((root / "big/run/records.jsonl").stat().st_size / 1e6),
            }
            result["first_start"] = measured(root, environment, size)
            result["next_start"] = measured(root, environment, size)
            result["index_mb"] = round(sum(f.stat().st_size for f in Path(folder, "cache").rglob("*.sqlite")) / 1e6)
            found["runs"].append(result)
            print(json.dumps(result, indent=1), flush=True)
    if drawn := int(options.get("drawn", "1500")):
        found["beside_a_run"] = beside_a_run(drawn)
        print(json.dumps(found["beside_a_run"], indent=1), flush=True)
    if "into" in options:
        into = Path(options["into"])
        kept = json.loads(into.read_text(encoding="utf-8")) if into.exists() else {}
        found["runs"] = found["runs"] or kept.get("runs", [])
        into.write_text(json.dumps(kept | found, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(root: Path, environment: dict[str, str], size: int) -> dict[str, Any]:
    """One start of the gallery, asked as the page asks."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "zimage_runner.view", str(root), "port=0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            told = time.perf_counter()
            while not (first := ask(address, "/api/pictures?limit=100"))["pictures"]:
                time.sleep(0.02)
            shown = time.perf_counter()
            while not ask(address, "/api/runs")["ready"]:
                time.sleep(0.1)
            whole = time.perf_counter()
            assert ask(address, "/api/pictures?limit=0")["total"] == size
            result = {
                "until_address_s": round(told - started, 2),
                "first_page_s": round(shown - told, 2),
                "pictures_then": first["total"],
                "whole_index_s": round(whole - told, 2),
                "filters_s": {
                    name: timed(address, f"/api/pictures?limit=100&{query}") for name, query in FILTERS.items()
                },
                "jump_s": timed(address, f"/api/pictures?limit=100&offset={size // 2}"),
                "facets_s": timed(address, "/api/facets"),
            }
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            result["peak_memory_mb"] = round(int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1000)
        finally:
            process.terminate()
    return result


def beside_a_run(pictures: int) -> dict[str, Any]:
    """Seconds a picture of one run while a gallery follows it and while that gallery is stopped, in turn.

    Windows of a few seconds of one process: what changes slowly on a machine is the same in both. Where there are two
    cores, the run has one and gallery and client have the other, as on any machine that has cores to spare.
    """
    cores = sorted(os.sched_getaffinity(0))
    taskset = (lambda core: ["taskset", "-c", str(core)]) if len(cores) > 1 else (lambda core: [])
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ZIMAGE_RUNNER_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        (Path(folder) / "outputs").mkdir()
        os.sched_setaffinity(0, cores[1:2] or cores)  # the client, and the gallery, which inherits it
        with follower(folder, environment) as (gallery, thumbnails):
            command = [*taskset(cores[0]), sys.executable, "-m", "zimage_runner", "prompt=a red apple"]
            command += [f"seeds=0-{pictures - 1}", "engine.threads=1", "sampling.num_inference_steps=1"]
            command += ["warmup=none", "output.report=false"]
            run = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            switches = [(time.time(), True)]
            while run.poll() is None:
                time.sleep(WINDOW_SECONDS)
                follows = not switches[-1][1]
                gallery.send_signal(signal.SIGCONT if follows else signal.SIGSTOP)
                switches.append((time.time(), follows))
            gallery.send_signal(signal.SIGCONT)
            assert run.returncode == 0
        done = sorted(path.stat().st_mtime for path in Path(folder).rglob("items/*/*/image.png"))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for (begin, follows), (end, _) in itertools.pairwise(switches):
        inside = [moment for moment in done if begin + SETTLED_SECONDS < moment < end]
        seconds[follows] += [after - before for before, after in itertools.pairwise(inside)]
    alone, viewed = (statistics.fmean(trimmed(seconds[follows])) for follows in (False, True))
    errors = [statistics.stdev(trimmed(s)) / statistics.fmean(s) / len(s) ** 0.5 for s in seconds.values()]
    return {
        "pictures": pictures,
        "windows": len(switches),
        "seconds_alone": round(alone, 4),
        "seconds_viewed": round(viewed, 4),
        "change_percent": round(100 * (viewed / alone - 1), 2),
        "standard_error_percent": round(100 * sum(e**2 for e in errors) ** 0.5, 2),
        "median_change_percent": round(
            100 * (statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1), 2
        ),
        "thumbnails_asked_for": len(thumbnails),
        "load_average": round(os.getloadavg()[0], 1),
    }


def trimmed(values: list[float]) -> list[float]:
    """Without the twentieth at either end: what else the machine did."""
    cut = len(values) // 20
    return sorted(values)[cut : len(values) - cut]


@contextlib.contextmanager
def follower(folder: str, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A gallery and a client that asks as its page does; its process, and the pictures whose thumbnails it had."""
    command = [sys.executable, "-m", "zimage_runner.view", f"{folder}/outputs", "port=0"]
    had: set[int] = set()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip().rstrip("/")

        def follow() -> None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/events", timeout=60) as events:
                for _ in (line for line in events if line.startswith(b"data:")):
                    for picture in ask(address, "/api/pictures?limit=100")["pictures"]:
                        if picture["id"] not in had:
                            had.add(picture["id"])
                            thumb = f"{address}/thumb/{picture['id']}?s=320&v={picture['v']}"
                            urllib.request.urlopen(thumb, timeout=60).read()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield process, had
        finally:
            process.terminate()
            thread.join(10)


def timed(address: str, path: str) -> float:
    """Seconds of the first answer: later ones are kept. A question nobody asked yet each time."""
    seconds = []
    for n in range(REPEATS):
        start = time.perf_counter()
        ask(
            address,
            path + ("&" if "?" in path else "?") + (f"star={('', 'kept', 'unmarked')[n]}" if "api/p" in path else ""),
        )
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds), 3)


def ask(address: str, path: str) -> Any:
    with urllib.request.urlopen(address.rstrip("/") + path, timeout=120) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
