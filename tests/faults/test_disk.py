"""Full disks, vanished and read-only directories, two processes on one run: the run stops cleanly and is resumable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_runs import Run, kill
from tests.support.gate import Gate

PROCESS = ["executor=process"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 kB: room for a handful of 128x128 noise pictures (49 kB each)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root; tests/outputs/test_writer.py covers the same with a failing write")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)


@pytest.mark.parametrize("overrides", [[], PROCESS])
def test_a_disk_that_fills_up(tmp_path, small_disk, overrides):
    run = Run(tmp_path, run_dir=small_disk / "run", overrides=["output.estimated_bytes_per_pixel=0", *overrides])
    assert run.execute() == 130
    assert "No space left on device: free some space" in run.log
    assert "Traceback" not in run.log
    assert "Logging error" not in run.log
    run.check(complete=False)
    half_written = [p for p in run.run_dir.rglob("*.tmp") if p.is_file()]
    assert not half_written
    grow(small_disk)
    assert run.execute() == 0
    run.check()


def test_the_run_stops_before_the_disk_is_full(tmp_path, small_disk):
    overrides = ["output.estimated_bytes_per_pixel=0", "output.min_free_gb=0.0002"]
    run = Run(tmp_path, run_dir=small_disk / "run", overrides=overrides)
    assert run.execute(ITEM_SECONDS=0.05) == 130
    assert "(output.min_free_gb=0.0002)" in run.log
    assert json.loads((run.run_dir / "summary.json").read_bytes())["status"] == "stopped"
    grow(small_disk)
    assert run.execute() == 0
    run.check()


def test_a_plan_that_cannot_fit_is_refused(tmp_path, small_disk):
    run = Run(tmp_path, run_dir=small_disk / "run")
    assert run.execute() == 2
    assert "free, the run needs about" in run.log
    assert not run.run_dir.exists()


def test_a_read_only_disk(tmp_path, small_disk):
    grow(small_disk)
    run = Run(tmp_path, run_dir=small_disk / "run", seeds=10)
    process = run.start(ITEM_SECONDS=0.3)
    run.wait_for_pictures(process, 3)
    assert process.pid is not None
    kill(process.pid)
    process.join()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run.execute() == 2
    assert f"cannot write to {run.run_dir} (Read-only file system)" in run.log
    assert "Traceback" not in run.log
    fresh = Run(tmp_path, run_dir=small_disk / "fresh")
    assert fresh.execute() == 2
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run.execute() == 0
    run.check()


@pytest.mark.parametrize("overrides", [[], PROCESS])
def test_a_vanished_run_directory(tmp_path, overrides):
    run = Run(tmp_path, seeds=50, overrides=overrides)
    process = run.start(ITEM_SECONDS=0.2)
    run.wait_for_pictures(process, 3)
    doomed = run.run_dir.rename(tmp_path / "doomed")
    while doomed.exists():  # pictures are written into it meanwhile
        shutil.rmtree(doomed, ignore_errors=True)
    process.join(60)
    assert process.exitcode == 130
    assert "the run directory has vanished" in run.log
    assert "Traceback" not in run.log
    assert not run.run_dir.exists(), "it was made again"


def test_a_run_directory_that_is_moved_is_followed(tmp_path):
    run, gate = Run(tmp_path, seeds=30), Gate(tmp_path, 3)  # which is open where there is no ledger
    process = run.start(ITEM_SECONDS=0.02, **gate.variables)
    run.wait_for_pictures(process, 3)
    moved = run.run_dir.rename(tmp_path / "moved")
    process.join(60)
    assert process.exitcode == 0, run.log
    run.run_dir = moved
    run.check()


def test_the_second_process_is_refused_and_the_first_goes_on(tmp_path):
    run, gate = Run(tmp_path, seeds=30), Gate(tmp_path, 2)  # more than are on their way to the ledger
    first = run.start(ITEM_SECONDS=0.02, **gate.variables)
    run.wait_for_pictures(first, 2)
    assert run.execute() == 2
    assert f"{run.run_dir} is in use by process {first.pid} on " in run.log
    gate.let(10**6)
    first.join(60)
    assert first.exitcode == 0
    run.check()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    run = Run(tmp_path)
    first = run.start({"on": 3, "kind": "hang"})
    run.wait_for_pictures(first, 2)
    assert first.pid is not None
    kill(first.pid)
    first.join()
    assert (run.run_dir / ".lock").exists()
    assert run.execute() == 0
    run.check()


def test_a_ledger_that_lost_power(tmp_path):
    """Blocks of zeros, a torn line and a picture cut short are what a power cut leaves without fsync."""
    run = Run(tmp_path)
    assert run.execute() == 0
    records = run.run_dir / "records.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:8]) + b"\0" * 300 + b"\n" + lines[9] + lines[10][:40])
    cut = run.run_dir / json.loads(lines[0])["item"] / "image.png"
    cut.write_bytes(cut.read_bytes()[:100])
    assert run.execute() == 0
    assert "damaged and drawn again" in run.log
    for name in run.items():
        assert (run.run_dir / name / "image.png").stat().st_size > 1000
