"""How large a run with output=shards can be, and how fast it is written.

    python -m benchmarks.shards [pictures=100000,1000000] [megabytes=400] [into=results.json]

For each size a run of that many items is planned, written with small pictures (128 bytes; their records are as long as
real ones) and read as resuming does; then a gallery of it is started as ``benchmarks/gallery.py`` does. ``megabytes``
pictures of 1 MB are written from memory by two threads, with ``output.fsync=item`` and ``run``, beside the same bytes
appended to one file with an fsync after each, and with one at the end, which is what the disk can do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gallery import measured  # noqa: E402
from benchmarks.variants import composed  # noqa: E402
from tests.support.written_runs import PARAMS  # noqa: E402
from zimage_runner.outputs.atomic import sync_filesystem, write_all  # noqa: E402
from zimage_runner.outputs.config import Fsync, Shards  # noqa: E402
from zimage_runner.outputs.item_files import Filed  # noqa: E402
from zimage_runner.outputs.ledger import Ledger, record_head  # noqa: E402
from zimage_runner.outputs.run_dir import RunDirectory  # noqa: E402
from zimage_runner.outputs.shard_files import ShardFiles  # noqa: E402
from zimage_runner.outputs.survey import survey  # noqa: E402
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, snapshot  # noqa: E402
from zimage_runner.runner.spec import plan_run  # noqa: E402

WRITTEN_AT_ONCE = 256
SMALL = 128
DRAWN = {"prompt": "", "params": PARAMS, "model": {"name": "zimage_turbo", "digest": "0" * 64}} | {
    "numerics": {"engine": "native", "dtype": "bfloat16", "device": "NVIDIA H200", "compile": "none"},
    "versions": {"zimage_runner": "1.0", "torch": "2.13.0", "python": "3.12.3"},
    "gpu_memory": {"peak_reserved_gb": 33.1, "peak_allocated_gb": 31.5},
}


def main(argv: list[str]) -> int:
    options = dict(word.split("=", 1) for word in argv)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "runs": [],
    }
    for size in [int(size) for size in options.get("pictures", "100000,1000000").split(",") if int(size)]:
        with tempfile.TemporaryDirectory() as folder:
            found["runs"].append(records(Path(folder), size))
            print(json.dumps(found["runs"][-1], indent=1), flush=True)
    if count := int(options.get("megabytes", "400")):
        found["pictures_of_1_mb"] = rates(count)
        print(json.dumps(found["pictures_of_1_mb"], indent=1), flush=True)
    found["load_average_after"] = round(os.getloadavg()[0], 1)
    if "into" in options:
        Path(options["into"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def records(folder: Path, size: int) -> dict[str, Any]:
    """Plan, write and read a run of so many items."""
    result: dict[str, Any] = {"pictures": size}
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as prompts:
        for n in range(size):
            prompts.write(json.dumps({"prompt": f"a lighthouse at hour {n}, watercolour"}) + "\n")
    words = ["prompts=jsonl", f"prompts.path={folder / 'prompts.jsonl'}", f"output.root={folder}", "output=shards"]
    config = composed(*words)
    with timed(result, "plan_s"):
        spec = plan_run(config)
    assert len(spec.plan) == size
    items, output = spec.plan.items, Shards(min_free_gb=0, fsync=Fsync.run)
    path = folder / "outputs" / "big" / "run"
    picture = random.Random(0).randbytes(SMALL)
    with RunDirectory.create(path) as run, timed(result, "write_s"):
        run.write_file(SNAPSHOT_NAME, snapshot(spec.plan.prompts))
        ledger = Ledger.load(run.records_path).open(run.dir_fd)
        files = ShardFiles(run, output)
        files.begin(ledger, {})
        for start in range(0, size, WRITTEN_AT_ONCE):
            lines = [line_of(files, item, picture) for item in items[start : start + WRITTEN_AT_ONCE]]
            ledger.append_all([filed.line for filed in lines])
            for filed in lines:
                files.recorded(filed)
        files.end(ledger, complete=True)
        ledger.close()
    result["ledger_mb"] = round((path / "records.jsonl").stat().st_size / 1e6)
    result["files_per_1000_pictures"] = round(1000 * sum(len(f) + len(d) for _, d, f in os.walk(path)) / size, 3)
    result["shards_mb"] = round(sum(file.stat().st_size for file in (path / "shards").iterdir()) / 1e6)
    with timed(result, "load_ledger_s"):
        ledger = Ledger.load(path / "records.jsonl")
    with timed(result, "survey_s"):
        assert len(survey(path, ledger, items).done) == size
    with RunDirectory.resume(path) as run, contextlib.closing(ledger.open(run.dir_fd)), timed(result, "settle_s"):
        ShardFiles(run, output).end(ledger, complete=True)
    with timed(result, "verify_s"):
        assert len(survey(path, ledger, items, verify=True).done) == size
    result["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    result["cpu_s_so_far"] = round(time.process_time(), 1)
    environment = {**os.environ, "ZIMAGE_RUNNER_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    result["gallery"] = measured(folder / "outputs", environment, size)
    result["index_mb"] = round(sum(f.stat().st_size for f in (folder / "cache").rglob("*.sqlite")) / 1e6)
    return result


def line_of(files: ShardFiles, item: Any, picture: bytes) -> Filed:
    """Add one picture. Return what the ledger has of it."""
    import hashlib

    result = {"image": "image.png", "sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture)}
    head = record_head(item.item_dir, "ok", item.prompt_index, item.seed, "f" * 64, **result)
    tail = {"seconds": 1.2, "timings": {"denoise": 1.1, "decode": 0.1}, "written": "2026-11-29T19:00:00.000+00:00"}
    place = files.add(picture, head | DRAWN | {"prompt": item.prompt.text} | tail)
    return Filed(line=head | place | tail)


def rates(count: int) -> dict[str, Any]:
    """Pictures of 1 MB a second: into shards, and the disk's own rate."""
    pictures = [random.Random(n).randbytes(1_000_000) for n in range(32)]
    found: dict[str, Any] = {"count": count}
    for fsync in (Fsync.item, Fsync.run):
        used = time.process_time()
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            found[f"fsync_{fsync.name}_s"] = seconds_for(Path(folder) / "run", fsync, pictures, count)
        found[f"fsync_{fsync.name}_cpu_ms"] = round(1000 * (time.process_time() - used) / count, 2)
        found[f"fsync_{fsync.name}_per_s"] = round(count / found[f"fsync_{fsync.name}_s"], 1)
    for name, each in (("disk", True), ("disk_one_fsync", False)):
        with tempfile.TemporaryFile(dir=Path.cwd()) as file, timed(found, f"{name}_s"):
            for n in range(count):
                write_all(file.fileno(), pictures[n % len(pictures)])
                if each:
                    os.fsync(file.fileno())
            os.fsync(file.fileno())
        found[f"{name}_per_s"] = round(count / found[f"{name}_s"], 1)
    return found


def seconds_for(path: Path, fsync: Fsync, pictures: list[bytes], count: int) -> float:
    """What writing so many pictures with two threads takes, until they are as safe as they shall be."""
    with RunDirectory.create(path) as run:
        ledger = Ledger.load(run.records_path).open(run.dir_fd)
        files = ShardFiles(run, Shards(min_free_gb=0, fsync=fsync, shard_mb=200))

        def write(n: int) -> None:
            item = f"items/{n:05d}_a/seed_0"
            head = record_head(item, "ok", n, 0, "f", image="image.png", sha256="0" * 64, bytes=1_000_000)
            line = head | files.add(pictures[n % len(pictures)], head | DRAWN)
            ledger.append(line, sync=fsync is Fsync.item)
            files.recorded(Filed(line=line))

        start = time.perf_counter()
        files.begin(ledger, {})
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(count)))
        files.end(ledger, complete=True)
        ledger.close()
        if fsync is Fsync.run:
            sync_filesystem(run.dir_fd)
        return round(time.perf_counter() - start, 2)


@contextlib.contextmanager
def timed(result: dict[str, Any], name: str) -> Iterator[None]:
    """Put the block's wall seconds into ``result``."""
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
    result[name] = round(time.perf_counter() - start, 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
