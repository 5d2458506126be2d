"""executor=ray with real Ray: three nodes on this machine, the embedded model, and kills at random instants."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_runs import kill
from tests.support.ray_cluster import Nodes, ray_cluster, workers
from zimage_runner.outputs.ledger import Ledger

pytest.importorskip("ray", reason="Ray is not installed: pip install 'zimage-runner[ray]'")

PLAN = (
    "+experiment=quickstart", 'prompts.texts=["a red circle","a blue square"]', "warmup=none", "output.min_free_gb=0",
    "output.report=false", "sampling.num_inference_steps=2", "sampling.height=128", "sampling.width=128",
)  # fmt: skip
RAY = (
    "executor=ray", "executor.num_cpus=1", "executor.backoff_s=0.01", "executor.max_restarts=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_cluster(2) as made:
        yield made


def check(run: Path, right: dict[str, str], *, complete: bool = True) -> None:
    """Nothing lost, doubled or corrupt: every picture is the undisturbed run's, its ledger line and record agree."""
    ledger = Ledger.load(run / "records.jsonl")
    assert ledger.damaged == 0
    done = {item: entry for item, entry in ledger.entries.items() if entry.ok}
    assert done.keys() == right.keys() if complete else done.keys() <= right.keys()
    for item, entry in done.items():
        data = (run / item / "image.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256 == right[item]
        assert json.loads((run / item / "record.json").read_bytes())["sha256"] == entry.sha256
    lines = (run / "records.jsonl").read_bytes().splitlines(keepends=True)
    good = [json.loads(line)["item"] for line in lines if line.endswith(b"\n") and b'"status":"ok"' in line]
    assert len(good) == len(set(good)), "an item was finished twice"


def lines(run: Path) -> int:
    with contextlib.suppress(OSError):
        return (run / "records.jsonl").read_bytes().count(b"\n")
    return 0


class Killer(threading.Thread):
    """Ends workers, and nodes, whenever some pictures more are done."""

    def __init__(self, run: Path, nodes: Nodes, *, kills: int, removed: list[Any], seed: int) -> None:
        super().__init__(daemon=True)
        self._run, self._nodes, self._removed = run, nodes, removed
        self._kills, self._random = kills, random.Random(seed)
        self.over = threading.Event()
        self.killed = 0

    def run(self) -> None:
        seen = 0
        while self.killed < self._kills + len(self._removed) and not self.over.is_set():
            if lines(self._run) <= seen:
                self.over.wait(0.005)
                continue
            time.sleep(self._random.uniform(0, 0.05))
            seen = lines(self._run) + self._random.randrange(3)
            if self.killed >= self._kills:
                self._nodes.remove(self._removed[self.killed - self._kills])
            elif found := workers():
                kill(self._random.choice(found))
            else:
                continue
            self.killed += 1


def test_three_nodes_with_a_worker_and_a_node_killed_draw_the_same_pictures(cli, tmp_path, nodes):
    seeds = 'seeds="0-11"'
    assert cli(*PLAN, seeds, "hydra.run.dir=inline")[0] == 0
    entries = Ledger.load(tmp_path / "inline" / "records.jsonl").entries
    right = {item: entry.sha256 for item, entry in entries.items()}
    assert len(right) == 24
    run = tmp_path / "run"
    killer = Killer(run, nodes, kills=2, removed=nodes.added[:1], seed=1)
    killer.start()
    code, _, err = cli(
        *PLAN, *RAY, seeds, f"executor.address={nodes.address}", "executor.writes=worker", "hydra.run.dir=run"
    )
    killer.over.set()
    killer.join()
    summary = json.loads((run / "summary.json").read_bytes())
    assert killer.killed == 3, "the run was over too soon"
    if code == 1:  # an item was hit twice and given up
        assert "given up: 2 worker processes died" in err
        code, _, err = cli("resume=run", "executor=inline")
    assert code == 0, err
    check(run, right)
    assert summary["session"]["executor"]["restarts"] >= 2
    assert len({worker["worker"] for worker in summary["session"]["executor"]["workers"] if worker["images"]}) > 1
