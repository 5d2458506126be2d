"""How large a run the gallery can show: time and memory on ledgers made for it.

    python benchmarks/gallery.py [pictures=100000,1000000] [pairs=4] [into=results.json]

For each size a run of that many pictures (prompts and ledger, no picture files; a new prompt for each picture) is made
in a temporary folder, and a gallery of it is started as a user does, first without an index, then again with it.
Measured: from the start of the process to its address, from there to the first page of 100 pictures with the newest
first, the time until every line is in the index, filters, a jump to the middle, and the process's largest memory.

Then what a viewer costs a run: ``pairs`` times the embedded model draws 100 pictures without and with a gallery that
follows it, the order changing from pair to pair, while a client takes its events and asks for each new thumbnail.
Compared are the CPU seconds of the run's own process: what else a busy machine does hardly shows in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
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
PICTURES = 100


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
    if pairs := int(options.get("pairs", "4")):
        found["beside_a_run"] = beside_a_run(pairs)
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


def beside_a_run(pairs: int) -> dict[str, Any]:
    """CPU seconds of runs without and with a gallery that follows them."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    shown = 0
    for n in range(pairs):
        for viewed in (False, True) if n % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "ZIMAGE_RUNNER_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
                environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
                (Path(folder) / "outputs").mkdir()
                with follower(folder, environment) if viewed else contextlib.nullcontext(set()) as thumbnails:
                    seconds[viewed].append(cpu_seconds_of_run(folder, environment))
                shown += len(thumbnails)
                print(f"{'viewed' if viewed else 'alone'}: {seconds[viewed][-1]:.2f} s", flush=True)
    change = [viewed / alone - 1 for alone, viewed in zip(seconds[False], seconds[True], strict=True)]
    return {
        "pictures": PICTURES,
        "cpu_s_alone": [round(s, 2) for s in seconds[False]],
        "cpu_s_viewed": [round(s, 2) for s in seconds[True]],
        "thumbnails_asked_for_in_a_run": round(shown / pairs),
        "median_change_percent": round(100 * statistics.median(change), 2),
        "change_of_medians_percent": round(
            100 * (statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1), 2
        ),
        "load_average": round(os.getloadavg()[0], 1),
    }


def cpu_seconds_of_run(folder: str, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "zimage_runner", "prompt=a red apple", f"seeds=0-{PICTURES - 1}"]
    command += ["sampling.num_inference_steps=1", "warmup=none", "output.report=false"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def follower(folder: str, environment: dict[str, str]) -> Iterator[set[int]]:
    """A gallery and a client that asks as its page does; the numbers of the pictures whose thumbnails it had."""
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
            yield had
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
