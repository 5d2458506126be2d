"""Time of the driver for each picture, with a thousand workers that write. Workers and pictures are simulated.

    python -m benchmarks.driver_time [--workers 1000] [--pictures 20000]

Everything else is the program's own: plan, queue, fingerprints, ledger, summary, progress. Ray's part of the driver
(sending a task and receiving its result) is not in it; docs/scale.md has it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import resource
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.simulated_fleet import SimulatedFleet
from zimage_runner.cli.main import main
from zimage_runner.executors.base import Batch, Sink, Written
from zimage_runner.executors.fleet import Notice, Part
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.executors.ray_pool import RayExecutor
from zimage_runner.memory.policies import Health
from zimage_runner.outputs.ledger import record_head
from zimage_runner.plan import Fingerprints
from zimage_runner.runner.run import Run


class Fleet(SimulatedFleet):
    """Workers that have written their batch as soon as somebody looks. Its own time is not the driver's."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, draw=written_parts)
        self.pace, self.elsewhere = 1.0, True
        self.cpu_seconds = 0.0

    def equip(self, worker: int, sink: Sink | None, *, must: bool) -> None:
        self.sinks[worker] = (sink, must)

    def draw(self, worker: int, ticket: int, batch: Batch) -> None:
        began = time.thread_time()
        super().draw(worker, ticket, batch)
        self.cpu_seconds += time.thread_time() - began

    def poll(self, timeout_s: float) -> list[Notice]:
        began = time.thread_time()
        found = super().poll(timeout_s)
        self.cpu_seconds += time.thread_time() - began
        return found


def written_parts(batch: Batch, sink: Sink | None) -> list[Part]:
    """What a worker reports of a batch that it has written."""
    written = []
    for item in batch.items:
        result = {"image": "image.png", "sha256": hashlib.sha256(b"%d" % item.seed).hexdigest(), "bytes": 1_500_000}
        head = record_head(item.item_dir, "ok", item.prompt_index, item.seed, _fingerprint(item), **result)
        written.append(Written(status="ok", line=head | {"timings": {"encode": 0.1, "denoise": 1.0, "decode": 0.1}}))
    return [Part(positions=list(range(len(batch.items))), written=written, details={"worker": "w"})]


_fingerprint = Fingerprints("", {})


def measure(workers: int, pictures: int, folder: Path) -> dict[str, float]:
    """Draw so many simulated pictures. Return seconds of the driver's CPU for each, and what it needed of memory."""
    fleet = Fleet(workers)
    times: dict[str, float] = {}

    def create(self: RayExecutorConfig, make_session: Any, *, stop: Any = None, **_: Any) -> RayExecutor:
        return RayExecutor(self, fleet, Health(), stop)

    def timed(name: str, real: Any) -> Any:
        def call(self: Run, *args: Any) -> Any:
            before = time.process_time() - fleet.cpu_seconds, time.perf_counter()
            result = real(self, *args)
            times[name] = time.process_time() - fleet.cpu_seconds - before[0]
            times[f"{name} wall"] = time.perf_counter() - before[1]
            return result

        return call

    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat with {n} hats\n" for n in range(pictures // 10)))
    with (
        mock.patch.object(RayExecutorConfig, "create", create),
        mock.patch.object(Run, "draw", timed("draw", Run.draw)),
        mock.patch.object(Run, "report", timed("report", Run.report)),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main(
            [
                "executor=ray", "prompts=text_file", f"prompts.path={prompts}", 'seeds="0-9"', "warmup=none",
                f"hydra.run.dir={folder}/run", f"output.root={folder}", "output.min_free_gb=0",
                "output.estimated_bytes_per_pixel=0",
            ]
        )  # fmt: skip
    assert code == 0, code
    lines = (folder / "run" / "records.jsonl").read_bytes().count(b"\n")
    assert lines == pictures, (lines, pictures)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "driver_cpu_ms_a_picture": (times["draw"] + times["report"]) / pictures * 1e3,
        "wall_ms_a_picture": (times["draw wall"] + times["report wall"] - fleet.cpu_seconds) / pictures * 1e3,
        "peak_host_gb": peak,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=20_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for name, value in measure(chosen.workers, chosen.pictures, Path(made)).items():
            print(f"{name:<26} {value:.3f}")
