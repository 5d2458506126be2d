"""What a multirun says: jobs that will be refused first, a line a job, where table and grid are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.faulty_session import FaultySession
from zimage_runner.cli.sweep.launcher import COMPLAINTS_TOLD, LONGEST_VALUE, job_labels
from zimage_runner.outputs.summary import brief

Cli = Callable[..., tuple[int, str, str]]
FAST = ("output.fsync=never", "hydra.callbacks.sweep_report.tile=16")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runner.runner.pool.Session", FaultySession)


def test_a_line_a_job_then_where_the_rest_is(cli: Cli) -> None:
    code, out, err = cli("-m", "prompt=a cat", "seeds=1", "sampling.num_inference_steps=2,4", *FAST)
    assert code == 0
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "job 0 (sampling.num_inference_steps=2)", "job 1 (sampling.num_inference_steps=4)", "table", "grid", "report",
    ]  # fmt: skip
    assert all(": 1 done, first image " in line for line in lines[:2])
    sweep = out.splitlines()[-1]
    assert sweep.endswith(lines[2].removeprefix("table: ").removesuffix("/summary.md (and summary.csv)"))
    assert lines[3].endswith("/grid.png")
    assert lines[4].endswith("/report.html")


def test_jobs_that_will_be_refused_are_told_before_the_first_begins(cli: Cli) -> None:
    code, _, err = cli("-m", "prompt=a cat", "seeds=1", "sampling.height=128,100,engine,64", *FAST)
    assert code == 2  # a value of the wrong kind is refused by Hydra's own check of every job
    assert "sampling.height=engine" in err
    code, _, err = cli("-m", "prompt=a cat", "seeds=1,x", "sampling.height=128,100", *FAST)
    assert code == 2
    lines = err.splitlines()
    told = [line for line in lines if "will be refused" in line]
    assert [line.split(" will be refused: ")[0] for line in told] == [f"zimage_runner: job {n}" for n in (1, 2, 3)]
    assert "sampling.height=100 is not a positive multiple of 16" in told[0]
    assert lines[:3] == told, "before anything is drawn"
    assert [line.split(":")[0] for line in lines if line.startswith("job ")] == ["job 0 (seeds=1, sampling.height=128)"]


def test_many_complaints_are_counted(cli: Cli) -> None:
    heights = ",".join(str(n) for n in range(101, 101 + COMPLAINTS_TOLD + 2))
    _, _, err = cli("-m", "prompt=a cat", "seeds=1", f"sampling.height={heights}", *FAST)
    assert err.count(" will be refused: ") == COMPLAINTS_TOLD
    assert f"{COMPLAINTS_TOLD + 2} jobs in all will be refused" in err


def test_one_run_has_its_table(cli: Cli) -> None:
    _, _, err = cli("prompt=a cat", "seeds=1", *FAST)
    assert "  items " in err
    assert "job 0" not in err


def test_labels_tell_what_differs() -> None:
    assert job_labels([["a=1", "b=2"], ["a=1", "b=3"]], 5) == ["job 5 (b=2)", "job 6 (b=3)"]
    assert job_labels([["a=1"]], 0) == ["job 0"]
    assert job_labels([], 0) == []
    (label, _) = job_labels([['prompt="' + "x\n" * 99 + '"'], ["prompt=y"]], 0)
    assert len(label) <= len("job 0 (prompt=)") + LONGEST_VALUE
    assert "\n" not in label


def test_what_went_wrong_follows_the_line() -> None:
    items = {"ok": 3, "done_before": 2, "linked": 1, "failed": 1, "remaining": 4}
    summary = {
        "items": items, "phases": {"load": 1.5, "warm_up": 0.0}, "images": {"first_seconds": 0.5, "mean_seconds": 0.25},
        "session": {"recovery": ["out of memory: 2 at a time"]}, "failed": [{"item": "i", "error": "e"}],
        "stopped": "SIGINT", "resume": "resume it",
    }  # fmt: skip
    first, *notes = brief(summary).splitlines()
    assert first == (
        "3 done, 2 done before, 1 linked, 1 failed, 4 not done, first image 0.50 s, then 0.250 s each, load 1.50 s"
    )
    assert [note.split(":")[0].strip() for note in notes] == ["note", "failed", "stopped", "to finish this run"]
