"""Whole runs whose engine raises, hangs, returns NaN or black, exhausts memory or dies on chosen items."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.fault_runs import Run

PROCESS = ["executor=process", "executor.backoff_s=0.01", "executor.item_timeout_s=3"]


def record(run: Run, seed: int) -> dict:
    return json.loads((run.run_dir / f"items/00000_a_cat/seed_{seed}/record.json").read_bytes())


@pytest.mark.parametrize("overrides", [[], [*PROCESS, "engine.batch_size=4"]])
def test_one_item_of_each_kind(tmp_path, overrides):
    run = Run(tmp_path, overrides=overrides)
    faults = [
        {"on": 1, "kind": "raise", "text": "no such token"},
        {"on": 2, "kind": "nan", "good_attempt": 2},
        {"on": 3, "kind": "black"},
        {"on": 4, "kind": "oom"},
    ]
    assert run.execute(*faults) == 1
    run.check(failed={1, 3})
    assert "ValueError: no such token" in record(run, 1)["error"]
    assert "VAE decoded in float32" in record(run, 2)["recovery"]
    assert "one colour throughout" in record(run, 3)["error"]
    assert "VAE decoded in tiles" in record(run, 4)["recovery"]
    summary = json.loads((run.run_dir / "summary.json").read_bytes())
    assert (summary["items"]["ok"], summary["items"]["failed"], summary["items"]["remaining"]) == (8, 4, 0)
    assert {f["item"].rpartition("_")[2] for f in summary["failed"]} == {"1", "3"}
    assert "to finish this run: " in run.log
    assert run.execute() == 0
    run.check()


def test_an_item_that_kills_and_one_that_hangs_do_not_end_the_night(tmp_path):
    run = Run(tmp_path, overrides=[*PROCESS, "executor.item_timeout_s=1.5"])
    # Seeds are shared by the two prompts: three items are deadly, for only one of them hangs.
    assert run.execute({"on": 1, "kind": "segv"}, {"on": 4, "kind": "hang", "times": 2}) == 1
    run.check(failed={1, 4})
    assert "given up: 2 worker processes died drawing this" in record(run, 1)["error"]
    assert "no sign of life" in record(run, 4)["error"]
    assert run.execute() == 0
    run.check()


def test_a_lost_gpu_ends_an_inline_run_and_resume_finishes_it(tmp_path):
    run = Run(tmp_path)
    assert run.execute({"on": 3, "kind": "lost", "times": 1}) == 130
    assert "stopped: the GPU can no longer be used" in run.log
    run.check(complete=False)
    assert run.execute() == 0
    run.check()


def test_a_lost_gpu_only_costs_the_worker_process(tmp_path):
    run = Run(tmp_path, overrides=PROCESS)
    assert run.execute({"on": 3, "kind": "lost", "times": 1}) == 0
    run.check()


def test_the_parent_of_a_worker_never_imports_torch(tmp_path):
    code = (
        "import sys; from tests.support.faulty_session import FaultySession; from zimage_runner.runner import pool; "
        "pool.Session = FaultySession; from zimage_runner.cli.main import main; code = main(sys.argv[1:]); "
        "assert code == 0; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    words = ["prompt=a cat", "executor=process", "warmup=none", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("overrides", [[], PROCESS])
def test_a_session_that_cannot_start_is_one_line_and_leaves_nothing(tmp_path, overrides):
    run = Run(tmp_path, overrides=overrides)
    assert run.execute({"on": "start", "kind": "refuse"}) == 2
    assert run.log == "zimage_runner: model.path=/nowhere has no model_index.json\n"
    assert not run.run_dir.exists()


def test_a_worker_that_cannot_start_is_one_line(tmp_path):
    run = Run(tmp_path, overrides=[*PROCESS, "executor.max_restarts=1"])
    assert run.execute({"on": "start", "kind": "kill"}) == 2
    assert "2 worker processes died one after the other" in run.log.splitlines()[-1]
    assert "Traceback" not in run.log
    assert not run.run_dir.exists()


def test_a_deliberately_plain_picture_can_be_allowed(tmp_path):
    from PIL import Image

    run = Run(tmp_path, overrides=["output.allow_constant=true"])
    assert run.execute({"on": 1, "kind": "black"}) == 0
    assert Image.open(run.run_dir / "items/00000_a_cat/seed_1/image.png").getextrema() == ((0, 0),) * 3
