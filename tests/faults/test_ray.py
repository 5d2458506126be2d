"""executor=ray with real Ray: three nodes on this machine, the embedded model, and kills at random instants."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from tests.support.controlnets import write_controlnet
from tests.support.fault_runs import Run
from tests.support.faulty_session import FaultySession, picture
from tests.support.gate import Gate, ledger_lines
from tests.support.ray_cluster import Nodes, drawing, kill_a_worker, ray_cluster, workers
from zimage_runner.outputs.ledger import Ledger

pytest.importorskip("ray", reason="Ray is not installed: pip install 'zimage-runner[ray]'")

RAY = (
    "executor=ray", "executor.num_cpus=1", "executor.backoff_s=0.01", "executor.max_restarts=1000",
)  # fmt: skip
SHARDS = ["output=shards", "output.shard_pictures=7"]
KILLS, CAMPAIGN = 22, 3
"""Of one run, and how many runs: every eleventh kill ends the driver, every eighth a node, the others a worker."""
BETWEEN = 20
"""Pictures that are let in before each kill, which comes after fewer as a rule."""
PAST_GATE = 8
"""Pictures at most that are drawn although the gate is closed: two batches of each of three workers, and some."""


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Gate:
    return Gate(tmp_path_factory.mktemp("three_nodes"), BETWEEN)


@pytest.fixture(scope="module")
def nodes(gate: Gate) -> Iterator[Nodes]:
    with ray_cluster(2, gate.environment) as made:
        yield made


class Killer(threading.Thread):
    """Ends a worker, then a node, whenever some pictures more are done and each of the three nodes draws."""

    def __init__(self, run: Run, gate: Gate, nodes: Nodes) -> None:
        super().__init__(daemon=True)
        self._of_run, self._gate, self._nodes = run, gate, nodes
        self.over = threading.Event()
        self.killed: list[str] = []

    def run(self) -> None:
        try:
            self._kill("worker", lambda: kill_a_worker(random.Random(0)))
            self._kill("node", lambda: self._nodes.remove(self._nodes.added[0]))
        finally:
            self._gate.let(10**6)

    def _kill(self, what: str, kill: Callable[[], object]) -> None:
        seen = ledger_lines(self._of_run.run_dir)
        self._gate.let(seen + BETWEEN)
        while ledger_lines(self._of_run.run_dir) < seen + 3 or drawing() < 3:
            if self.over.wait(0.005):
                return
        kill()
        self.killed.append(what)


def test_three_nodes_with_a_worker_and_a_node_killed(cli, gate, nodes, monkeypatch):
    monkeypatch.setattr("zimage_runner.runner.pool.Session", FaultySession)
    overrides = [*RAY, f"executor.address={nodes.address}", "executor.writes=worker"]
    run = Run(gate.folder, seeds=40, overrides=overrides)
    killer = Killer(run, gate, nodes)
    killer.start()
    code, _, err = cli(*run.argv())
    killer.over.set()
    killer.join()
    assert killer.killed == ["worker", "node"], err
    assert code == 0, err
    run.check()
    executor = json.loads((run.run_dir / "summary.json").read_bytes())["session"]["executor"]
    assert executor["restarts"] >= 2, err
    assert sum(worker["images"] > 0 for worker in executor["workers"]) >= 2
    assert "raylet" not in err
    assert "(pid=" not in err


@pytest.mark.slow  # two processes import torch
def test_the_embedded_model_draws_the_same_pictures_on_two_nodes(cli, tmp_path, nodes):
    write_controlnet(tmp_path / "net.safetensors", "2.1")
    Image.linear_gradient("L").resize((128, 128)).save(tmp_path / "picture.png")
    rows = [
        {"text": "a red circle"},
        {"text": "a red circle", "control_image": "picture.png"},
        {"text": "a blue square", "control_image": "picture.png", "image": "picture.png", "outpaint": "32"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plan = ("model=zimage_nano", "model.controlnet=net.safetensors", "prompts=jsonl", "prompts.path=rows.jsonl",
            "warmup=none", "output.min_free_gb=0", "output.report=false", 'seeds="0-1"')  # fmt: skip
    assert cli(*plan, "hydra.run.dir=inline")[0] == 0
    code, _, err = cli(*plan, *RAY, f"executor.address={nodes.address}", "hydra.run.dir=ray")
    assert code == 0, err
    ours, theirs = (Ledger.load(tmp_path / run / "records.jsonl").entries for run in ("ray", "inline"))
    assert ours == theirs
    assert len(ours) == 6


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "executor.address=127.0.0.1:1: nobody answers there (Connection refused): start a cluster"),
        ("ray://head:10001", "executor.address=ray://head:10001: write host:port as `ray start --head` prints it"),
        ("head", "executor.address=head: write host:port"),
        ("head:99999", "executor.address=head:99999: write host:port"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(cli, tmp_path, address, text):
    code, _, err = cli("+experiment=quickstart", "executor=ray", f"executor.address={address}")
    assert code == 2
    assert text in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/*/*")), "no run directory is left"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("seed", "shards"),
    [*((seed, []) for seed in range(CAMPAIGN)), (10, SHARDS), (11, [*SHARDS, "output.layout=parquet"])],
)
def test_kills_of_workers_nodes_and_driver(tmp_path, seed, shards):
    rng, gate = random.Random(seed), Gate(tmp_path, 0)
    with ray_cluster(2, gate.environment | {"FAULTS_ITEM_SECONDS": "0.005"}) as nodes:
        options = [*RAY, f"executor.address={nodes.address}", "executor.writes=worker", *shards]
        run = Run(tmp_path, seeds=KILLS * (BETWEEN + PAST_GATE) // 2 + 1, overrides=options)
        driver, counts = start(run), Counter[str]()
        for n in range(KILLS):
            what = "driver" if n % 11 == 10 else "node" if n % 8 == 5 else "worker"
            seen, deadline = ledger_lines(run.run_dir), time.monotonic() + 600
            gate.let(seen + BETWEEN)
            more = 1 + rng.randrange(3)
            while ledger_lines(run.run_dir) < seen + more:
                assert driver.poll() is None, f"the run was over after {dict(counts)}\n{run.log}"
                assert time.monotonic() < deadline, f"nothing happens after {dict(counts)}\n{run.log}"
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            if what == "driver":
                driver.kill()
                driver.wait()
                run.check(complete=False)
                driver = start(run)
            elif what == "node":
                nodes.remove(nodes.added.pop(rng.randrange(2)))
                nodes.added.append(nodes.add())
            else:
                kill_a_worker(rng)
            counts[what] += 1
        gate.let(10**6)
        code = driver.wait(600)
        assert code in (0, 1), run.log  # 1: an item was hit twice and given up
        if code:
            assert "given up: 2 worker processes died" in run.log
            assert start(run).wait(300) == 0, run.log
        assert counts == {"worker": 18, "node": 2, "driver": 2}
        run.check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_the_least_to_the_most_workers_as_nodes_join(tmp_path):
    """One worker has room at first, two are the least: the run begins once a node has joined, and takes a third."""
    gate = Gate(tmp_path, 10)
    with ray_cluster(0, gate.environment) as nodes:
        options = [*RAY, f"executor.address={nodes.address}", "executor.workers=2-3"]
        run = Run(tmp_path, seeds=60, overrides=options)
        driver = start(run)
        until(lambda: len(workers()) == 1, driver, run)
        assert not ledger_lines(run.run_dir)
        nodes.add()
        until(lambda: ledger_lines(run.run_dir) >= 10, driver, run)
        nodes.add()
        nodes.add()  # no worker takes this place: three are the most
        until(lambda: len(workers()) == 3, driver, run)
        gate.let(10**6)
        assert driver.wait(300) == 0, run.log
        run.check()
    executor = json.loads((run.run_dir / "summary.json").read_bytes())["session"]["executor"]
    assert (executor["restarts"], len(executor["workers"])) == (0, 3), executor
    assert all(worker["images"] > 0 for worker in executor["workers"])


def until(condition: Callable[[], bool], driver: subprocess.Popen[bytes], run: Run) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert driver.poll() is None, run.log
        assert time.monotonic() < deadline, run.log
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pictures_on_their_way_are_more_than_the_object_store_holds(cli, tmp_path, monkeypatch):
    """Two workers of a Ray that the run starts have up to four pictures of 48 MB on their way; it holds 80 MB."""
    monkeypatch.setattr("zimage_runner.runner.pool.Session", FaultySession)
    monkeypatch.setenv("FAULTS", "[]")
    side = 4000
    words = ["model=zimage_nano", "model.native_sizes=[]", "prompt=a cat", 'seeds="0-5"', "warmup=none",
             f"sampling.height={side}", f"sampling.width={side}", "hydra.run.dir=run", "output.min_free_gb=0",
             "output.report=false"]  # fmt: skip
    code, _, err = cli(*words, *RAY, "executor.object_store_gb=0.08", "executor.workers=2")
    assert code == 0, err
    executor = json.loads((tmp_path / "run" / "summary.json").read_bytes())["session"]["executor"]
    assert (executor["restarts"], len(executor["workers"])) == (0, 2)
    for seed in range(6):
        (file,) = (tmp_path / "run").glob(f"items/*/seed_{seed}/image.png")
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), picture("a cat", seed, side, side))


def start(run: Run) -> subprocess.Popen[bytes]:
    """The program in a process of its own, over sessions that draw at once."""
    words = [sys.executable, "-m", "tests.support.fault_runs", *run.argv()]
    with open(run.folder / "log", "ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"FAULTS": "[]"})
