from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.outputs import lock as lock_module
from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.config import Output
from zimage_runner.outputs.run_dir import RunDirectory, checked_item_dir

HOLD = """
import sys, time
from zimage_runner.outputs.run_dir import RunDirectory
held = RunDirectory.create(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_and_a_dead_one_is_taken_over(tmp_path):
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            RunDirectory.resume(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    RunDirectory.resume(tmp_path / "run").close()
    assert not (tmp_path / "run" / ".lock").exists()


def test_lock_is_free_again_after_close(tmp_path):
    for _ in range(2):
        with RunDirectory.create(tmp_path / "run"), pytest.raises(UserError, match="in use"):
            RunDirectory.create(tmp_path / "run")


def no_flock(*_: object) -> None:
    raise OSError(37, "No locks available")


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"started": "1"}, False),
        ({"boot": "other"}, False),
        ({"pid": 2**22 + 1}, False),
        ({"host": "elsewhere", "boot": "other"}, True),
    ],
)
def test_without_flock_the_owner_in_the_file_decides(tmp_path, monkeypatch, change, refused):
    monkeypatch.setattr(lock_module.fcntl, "flock", no_flock)
    owner = {**lock_module._this_process(), **change}
    (tmp_path / ".lock").write_text(json.dumps(owner), encoding="utf-8")
    if refused:
        with pytest.raises(UserError, match=f"process {owner['pid']} on {owner['host']}"):
            RunDirectory.create(tmp_path)
    else:
        RunDirectory.create(tmp_path).close()


def test_garbage_in_the_lock_file_is_no_owner(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\0[3]")
    RunDirectory.create(tmp_path).close()


def test_new_run_refuses_a_directory_with_a_ledger(tmp_path):
    (tmp_path / "records.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"already holds a run: continue it with resume="):
        RunDirectory.create(tmp_path)
    RunDirectory.resume(tmp_path).close()


def test_resume_needs_a_directory(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        RunDirectory.resume(tmp_path / "none")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write to .*set output\.root"):
        RunDirectory.create(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        RunDirectory.create(tmp_path / "run")


def test_space_for_the_plan(tmp_path, monkeypatch):
    with RunDirectory.create(tmp_path) as run:
        run.check_space([(1024, 1024)] * 2, Output(min_free_gb=0))
        with pytest.raises(UserError, match=r"the run needs about 6295\.\d+ GB"):
            run.check_space(((4096, 4096) for _ in range(250_000)), Output())
        run.check_space([(4096, 4096)] * 250, Output(estimated_bytes_per_pixel=0, min_free_gb=0))
        monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: 400_000_000)
        with pytest.raises(DiskError, match=r"only 0\.40 GB free \(output\.min_free_gb=0\.5\)"):
            run.check_free(Output())
        run.check_free(Output(min_free_gb=0.3))


def test_files_appear_whole(tmp_path):
    with RunDirectory.create(tmp_path) as run:
        run.write_file("a/b/summary.json", b"one", sync=True)
        run.write_file("a/b/summary.json", b"two")
        assert (tmp_path / "a/b/summary.json").read_bytes() == b"two"
        assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["summary.json"]


def test_a_vanished_directory_is_not_recreated(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        (tmp_path / "run" / ".lock").unlink()
        (tmp_path / "run").rmdir()
        with pytest.raises(DiskError, match="vanished"):
            run.write_file("a/summary.json", b"")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "items/../../x",
        "items//x",
        "a/./b",
        "a\0b",
        "items/a\nb",
        "items/\u202egnp.exe",
        "items/\ud800",
        "C:\\x",
        "items/" + "x" * 256,
    ],
)
def test_unsafe_item_directories_never_reach_the_disk(name):
    with pytest.raises(ValueError, match="unsafe item directory"):
        checked_item_dir(name)


@given(st.text(max_size=40))
def test_a_checked_name_stays_inside(name):
    try:
        checked = checked_item_dir(name)
    except ValueError:
        return
    assert Path(os.path.normpath(Path("/run") / checked)) == Path("/run") / checked


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"png_compress_level": 10}, "output.png_compress_level=10 is out of range: use 0 to 9"),
        ({"writer_threads": 0}, "output.writer_threads=0 is out of range"),
        ({"max_pending_images": 0}, "output.max_pending_images=0 is out of range"),
        ({"min_free_gb": float("nan")}, "output.min_free_gb=nan is out of range"),
        ({"root": " "}, "output.root='' is empty"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError) as error:
        Output(**options)
    assert text in str(error.value)
