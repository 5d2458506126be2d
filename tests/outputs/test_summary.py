from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.written_runs import request
from zimage_runner.errors import one_line
from zimage_runner.outputs.summary import Summary, resume_command, table
from zimage_runner.outputs.writer import Outcome

REPORT = {
    "phases": {"load": 2.0, "warm_up": 1.0},
    "gpu_memory": {"peak_allocated_gb": 20.5, "peak_reserved_gb": 22.0},
}


def summary_of(seconds: list[float], *, failed: int = 0, planned: int | None = None, before: int = 0) -> Summary:
    planned = before + len(seconds) + failed if planned is None else planned
    summary = Summary(Path("/runs/a b"), planned=planned, already_done=before)
    summary.start_clock()
    now = summary._clock
    for n, share in enumerate(seconds):
        now += share
        summary.add(Outcome(request=request(n), status="ok", seconds=share, arrived=now))
    for n in range(failed):
        summary.add(Outcome(request=request(n, index=9), status="failed", error="ValueError: a\nb\x1b[31m"))
    return summary


def test_first_image_and_the_rest_are_timed_apart():
    images = summary_of([5.0, 1.0, 1.0, 1.0, 2.0]).to_dict(REPORT)["images"]
    assert images["first_seconds"] == pytest.approx(5.0)
    assert images["mean_seconds"] == pytest.approx(1.25)
    assert images["median_seconds"] == pytest.approx(1.0)
    assert images["p95_seconds"] == pytest.approx(2.0)
    assert images["images_per_second"] == pytest.approx(4 / 5)


def test_complete_run():
    found = summary_of([1.0, 1.0], before=3).to_dict(REPORT)
    assert found["status"] == "complete"
    assert found["resume"] is None
    assert found["items"] == {"planned": 5, "done_before": 3, "linked": 0, "ok": 2, "failed": 0, "remaining": 0}
    text = table(found)
    for part in ("load", "2.00 s", "warm up", "first image", "20.50 GB (22.00 GB reserved)", "2 done, 3 done before"):
        assert part in text


def test_failures_are_listed_on_one_line_each():
    found = summary_of([1.0], failed=12).to_dict(REPORT)
    assert found["status"] == "failures"
    assert len(found["failed"]) == 12
    text = table(found)
    assert "failed: items/0009_a/seed_0: ValueError: a b [31m" in text
    assert "\x1b" not in text
    assert "... and 2 more failed" in text


def test_stopped_run_prints_the_command_that_resumes():
    found = summary_of([1.0], planned=3).to_dict(REPORT, stopped="SIGINT")
    assert found["status"] == "stopped"
    assert found["items"]["remaining"] == 2
    assert shlex.split(found["resume"])[1:] == ["-m", "zimage_runner", "resume=/runs/a b"]
    assert f"to finish this run: {resume_command(Path('/runs/a b'))}" in table(found)


def test_what_had_to_be_given_way_to_is_told():
    workers = {"restarts": 2, "deaths": ["ended with exit code 3", "was killed (SIGKILL)"], "recycled": 1}
    text = table(summary_of([1.0]).to_dict({**REPORT, "recovery": ["half the batch"], "executor": workers}))
    assert "note: half the batch" in text
    assert "note: workers that died and were replaced: 2 (the last one was killed (SIGKILL))" in text
    assert "note: workers that were replaced for their size or age: 1" in text


def test_the_command_names_the_interpreter_as_the_shell_finds_it(tmp_path, monkeypatch):
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.chdir(tmp_path)
    assert resume_command(Path("/r")) == ".venv/bin/python -m zimage_runner resume=/r"
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", str(program.parent))
    assert resume_command(Path("/a b")) == "python -m zimage_runner 'resume=/a b'"


def test_no_picture_at_all():
    text = table(summary_of([], planned=1).to_dict({}))
    assert "first image" not in text


def test_one_line_is_safe_for_a_terminal():
    assert one_line("a\r\n\x1b]0;x\x07\u202eb") == "a   ]0;x  b"
    assert one_line("x" * 1000, 300) == "x" * 297 + "..."


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, []),
        (2, [f"worker {n} 3 images, 1.50 images/s, idle 25%, on a{died}" for n, died in ((1, ""), (2, ", died"))]),
        (20, ["workers  20, 1.50 images/s each (the slowest 1.50), idle 25%, 10 died"]),
    ],
)  # fmt: skip
def test_what_each_worker_has_done_is_told(count: int, expected: list[str]) -> None:
    workers = [
        {"worker": f"worker {n} on a", "images": 3, "images_per_second": 1.5, "idle_share": 0.25, "died": n % 2 == 0}
        for n in range(1, count + 1)
    ]
    summary = Summary(Path("run"), planned=1).to_dict({"executor": {"kind": "ray", "workers": workers}})
    rows = [" ".join(line.split()) for line in table(summary).splitlines() if line.lstrip().startswith("worker")]
    assert rows == [" ".join(line.split()) for line in expected]
