"""kill -9 of the process and of its worker at random instants."""

from __future__ import annotations

import random
import time

import pytest

from tests.faults.driver import Run, all_gone, children_of, kill

PROCESS = ["executor=process", "executor.backoff_s=0.01", "executor.max_restarts=1000"]
CAMPAIGN = 7
"""Seeds of the long form: 7 x (12 + 10 + 10) = 224 kills."""


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
        process.join(10)
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


def test_the_process_a_few_times(tmp_path):
    kill_the_process(tmp_path, [], 4, 100)


def test_the_process_with_its_worker_a_few_times(tmp_path):
    kill_the_process(tmp_path, PROCESS, 2, 100)


def test_the_worker_a_few_times(tmp_path):
    kill_the_worker(tmp_path, 3, 100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_process(tmp_path, seed):
    kill_the_process(tmp_path, [], 12, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_process_with_its_worker(tmp_path, seed):
    kill_the_process(tmp_path, PROCESS, 10, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_the_worker(tmp_path, seed):
    kill_the_worker(tmp_path, 10, seed)
