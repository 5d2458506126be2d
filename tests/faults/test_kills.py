"""kill -9 of the process, of its worker and of whole multiruns at random instants."""

from __future__ import annotations

import csv
import json
import random
import time

import pytest

from tests.support.fault_runs import PROMPTS, Run, all_gone, children_of, kill
from zimage_runner.cli.resume.sweep import is_sweep

PROCESS = ["executor=process", "executor.backoff_s=0.01", "executor.max_restarts=1000"]
SHARDS = ["output=shards", "output.shard_pictures=5"]
CAMPAIGN = 7
"""Seeds of the long form: 7 x (12 + 10 + 10 + 10) = 294 kills, and 7 x 24 of runs with shards."""


def kill_the_process(tmp_path, overrides: list[str], rounds: int, seed: int) -> None:
    """Kill it ``rounds`` times, anywhere from its first instant to its end, then let it finish."""
    rng = random.Random(seed)
    run = Run(tmp_path, seeds=rounds * 4, overrides=overrides)
    for n in range(rounds):
        process = run.start(ITEM_SECONDS=0.005)
        if n % 4:
            run.wait_for_pictures(process, rng.randrange(1, 5))
        time.sleep(rng.uniform(0, 0.05 if n % 4 else 0.6))
        assert process.pid is not None
        workers = children_of(process.pid)
        kill(process.pid)
        process.join(60)
        assert all_gone(workers)
        if run.started:
            run.check(complete=False)
    assert run.execute() == 0, run.log
    run.check()


def kill_the_worker(tmp_path, kills: int, seed: int) -> None:
    """Kill the worker again and again while one process goes on."""
    rng = random.Random(seed)
    run = Run(tmp_path, seeds=kills * 12, overrides=PROCESS)
    process = run.start(ITEM_SECONDS=0.01)
    done = 0
    while done < kills and process.is_alive():
        run.wait_for_pictures(process, rng.randrange(1, 4))
        time.sleep(rng.uniform(0, 0.05))
        assert process.pid is not None
        for worker in children_of(process.pid):
            kill(worker)
            done += 1
    process.join(60)
    assert done == kills, f"the run was over too soon\n{run.log}"
    assert process.exitcode in (0, 1), run.log  # 1: an item was hit twice and given up
    if process.exitcode:
        assert "given up: 2 worker processes died" in run.log
        assert run.execute() == 0
    run.check()


def kill_the_multirun(tmp_path, jobs: int, rounds: int, seed: int) -> None:
    """Kill it ``rounds`` times, between its jobs and within them, then let it finish."""
    rng = random.Random(seed)
    sweep = tmp_path / "sweep"
    process_of = Run(tmp_path, run_dir=sweep)
    runs = [Run(tmp_path, seeds=3, run_dir=sweep / str(job)) for job in range(jobs)]
    prompts = json.dumps(PROMPTS, ensure_ascii=False)
    names = ",".join(f"job{job}" for job in range(jobs))
    new = [
        "-m", f"prompts.texts={prompts}", 'seeds="0-2"', f"name={names}", f"hydra.sweep.dir={sweep}",
        "output.min_free_gb=0", "warmup=none", "hydra.callbacks.sweep_report.grid=false",
    ]  # fmt: skip
    process_of.argv = lambda: [f"resume={sweep}"] if is_sweep(sweep) else new  # type: ignore[method-assign]
    for n in range(rounds):
        before = sum((run.run_dir / "records.jsonl").exists() for run in runs)
        process = process_of.start(ITEM_SECONDS=0.002)
        deadline = time.monotonic() + 30
        while n and process.is_alive() and time.monotonic() < deadline:
            begun = sum((run.run_dir / "records.jsonl").exists() for run in runs)
            if begun >= min(jobs, before + 1):
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15 if n else 0.6))
        assert process.pid is not None
        kill(process.pid)
        process.join(60)
        for run in runs:
            if run.started and (run.run_dir / "records.jsonl").exists():
                run.check(complete=False)
    assert process_of.execute() == 0, process_of.log
    for run in runs:
        run.check()
        summary = json.loads((run.run_dir / "summary.json").read_bytes())
        assert (summary["status"], summary["items"]["remaining"]) == ("complete", 0)
    with (sweep / "summary.csv").open() as table:
        assert [row["status"] for row in csv.DictReader(table)] == ["complete"] * jobs


def test_the_process_a_few_times(tmp_path):
    kill_the_process(tmp_path, [], 3, 100)


def test_the_process_with_its_worker_a_few_times(tmp_path):
    kill_the_process(tmp_path, PROCESS, 2, 100)


@pytest.mark.parametrize("layout", ["webdataset", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_run_with_shards_a_few_times(tmp_path, layout):
    kill_the_process(tmp_path, [*SHARDS, f"output.layout={layout}"], 2, 100)


def test_the_multirun_a_few_times(tmp_path):
    kill_the_multirun(tmp_path, 4, 3, 100)


def test_the_worker_a_few_times(tmp_path):
    kill_the_worker(tmp_path, 2, 100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_process(tmp_path, seed):
    kill_the_process(tmp_path, [], 12, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_run_with_shards(tmp_path, layout, seed):
    kill_the_process(tmp_path, [*SHARDS, f"output.layout={layout}"], 12, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_process_with_its_worker(tmp_path, seed):
    kill_the_process(tmp_path, PROCESS, 10, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_worker(tmp_path, seed):
    kill_the_worker(tmp_path, 10, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_multirun(tmp_path, seed):
    kill_the_multirun(tmp_path, 12, 10, seed)
