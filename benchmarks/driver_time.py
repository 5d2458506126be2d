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
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from zimage_runner.cli.main import main
from zimage_runner.executors.base import Batch, Sink, Written
from zimage_runner.executors.fleet import Done, Event, Hired, Notice, Part, Ready
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.executors.ray_pool import RayExecutor
from zimage_runner.memory.policies import Health
from zimage_runner.outputs.ledger import record_head
from zimage_runner.plan import Encoding, Fingerprints
from zimage_runner.runner.run import Run

REPORT: dict[str, Any] = {
    "phases": {"load": 0.0}, "numerics": {"engine": "simulated"}, "versions": {}, "gpu_memory": {}, "device_name": "",
}  # fmt: skip


class SimulatedFleet:
    """Workers that have written their batch as soon as somebody looks. Its own time is not the driver's."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.cpu_seconds = 0.0
        self._batches: dict[int, list[tuple[int, Batch]]] = {}
        self._events: list[tuple[int, Event]] = []

    def connect(self) -> None: ...

    def places(self) -> int:
        return self.workers

    def hire(self, worker: int) -> None:
        self._batches[worker] = []
        self._events.append((worker, Hired(node=f"node{worker // 8}", is_elsewhere=True)))

    def load(self, worker: int) -> None:
        self._events.append((worker, Ready(report=REPORT)))

    def extend(self, worker: int, shapes: Sequence[Any], texts: Sequence[Encoding]) -> None: ...

    def equip(self, worker: int, sink: Sink | None, *, must: bool) -> None: ...

    def draw(self, worker: int, ticket: int, batch: Batch) -> None:
        self._batches[worker].append((ticket, batch))

    def poll(self, timeout_s: float) -> list[Notice]:
        began = time.thread_time()
        events, self._events = self._events, []
        for worker, waiting in self._batches.items():
            if waiting:
                events.append((worker, self._done(*waiting.pop(0))))
        self.cpu_seconds += time.thread_time() - began
        return [Notice(worker, lambda event=event: event) for worker, event in events]

    def _done(self, ticket: int, batch: Batch) -> Done:
        written = []
        for item in batch.items:
            result = {"image": "image.png", "sha256": hashlib.sha256(b"%d" % item.seed).hexdigest(), "bytes": 1_500_000}
            head = record_head(item.item_dir, "ok", item.prompt_index, item.seed, _fingerprint(item), **result)
            timings = {"encode": 0.1, "denoise": 1.0, "decode": 0.1}
            written.append(Written(status="ok", line={**head, "timings": timings}))
        parts = [Part(positions=list(range(len(batch.items))), written=written, details={"worker": "w"})]
        return Done(ticket=ticket, parts=parts, report=REPORT, seconds=1.0)

    def fire(self, worker: int) -> None:
        self._batches.pop(worker, None)

    def describe(self) -> str:
        return ""

    def close(self) -> None: ...


_fingerprint = Fingerprints("", {})


def measure(workers: int, pictures: int, folder: Path) -> dict[str, float]:
    """Draw so many simulated pictures. Return seconds of the driver's CPU for each, and what it needed of memory."""
    fleet = SimulatedFleet(workers)
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
