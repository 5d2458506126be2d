"""How large a run the gallery can show: time and memory on ledgers made for it.

    python benchmarks/gallery.py [pictures=100000,1000000] [into=results.json]

For each size a run of that many pictures (prompts and ledger, no picture files; a new prompt for each picture) is made
in a temporary folder, and a gallery of it is started as a user does, first without an index, then again with it.
Measured: from the start of the process to its address, from there to the first page of 100 pictures with the newest
first, the time until every line is in the index, filters, a jump to the middle, and the process's largest memory.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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


def main(argv: list[str]) -> int:
    options = dict(word.split("=", 1) for word in argv)
    sizes = [int(size) for size in options.get("pictures", "100000,1000000").split(",")]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "runs": [],
    }
    for size in sizes:
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
    if "into" in options:
        Path(options["into"]).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measured(root: Path, environment: dict[str, str], size: int) -> dict[str, Any]:
    """One start of the gallery, asked as the page asks."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "zimage_runner.view", str(root), "port=0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
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
            status = Path(f"/proc/{process.pid}/status").read_text()
            result["peak_memory_mb"] = round(int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1000)
        finally:
            process.terminate()
    return result


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
