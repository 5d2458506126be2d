"""Threads, memory and processes that the system refuses, and threads that die: seen at once, and the run resumable."""

from __future__ import annotations

import errno
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_runs import Run
from tests.support.faulty_session import FaultySession
from zimage_runner.cli.main import main
from zimage_runner.executors.messages import Broken
from zimage_runner.executors.worker import Worker
from zimage_runner.outputs import atomic, encoders
from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.writer import Writer
from zimage_runner.runner import pool
from zimage_runner.runner.progress import ProgressDisplay
from zimage_runner.signals import graceful_stop

REFUSED = "can't start new thread"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Four pictures, drawn in this process."""
    monkeypatch.setattr(pool, "Session", FaultySession)
    monkeypatch.setenv("FAULTS", "[]")
    return Run(tmp_path, seeds=2)


def finish(run: Run) -> None:
    """What is left is drawn; nothing is lost or drawn twice."""
    assert main(run.argv()) == 0
    run.check()


def refuse_threads(monkeypatch: pytest.MonkeyPatch, is_refused) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if is_refused(thread):
            raise RuntimeError(REFUSED)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize(("name", "code"), [("signals", 0), ("receiver", 130), ("writer", 130), ("writer_1", 0)])
def test_a_thread_is_refused(run, monkeypatch, capfd, name, code):
    with monkeypatch.context() as patch:
        refuse_threads(patch, lambda thread: thread.name.startswith(name))
        assert main(run.argv()) == code
    assert (REFUSED in capfd.readouterr().err) == (name != "signals")
    assert json.loads((run.run_dir / "summary.json").read_bytes())["status"] == ("complete" if code == 0 else "stopped")
    finish(run)


@pytest.mark.parametrize("granted", [0, 3])
def test_every_thread_is_refused_from_some_point_on(run, monkeypatch, granted):
    count = itertools.count()
    with monkeypatch.context() as patch:
        refuse_threads(patch, lambda thread: next(count) >= granted)
        assert main(run.argv()) in (0, 2, 130)
    finish(run)


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(3)])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Writer, "_receive_all"),
        (Writer, "_work"),
        (encoders, "encode"),
        (Ledger, "append"),
        (ProgressDisplay, "update"),
    ],
)
def test_whatever_is_raised_in_any_thread_ends_the_run(run, monkeypatch, capfd, owner, name, error):
    def fail(*_: object, **__: object) -> object:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert main(run.argv()) == 130
    assert json.loads((run.run_dir / "summary.json").read_bytes())["status"] == "stopped"
    finish(run)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["receiver", "writer_1"])
def test_a_thread_that_ends_before_it_is_watched_is_missed(run, monkeypatch, capfd, name):
    real = Writer._seen

    def seen(writer: Writer, target: Callable[[], None]) -> None:
        if threading.current_thread().name == name:
            raise MemoryError
        real(writer, target)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_seen", seen)
        assert main(run.argv()) in (0, 130)  # one writer of two may have been enough
    finish(run)


def test_a_batch_that_cannot_be_queued_ends_the_run(run, monkeypatch):
    class Full(queue.SimpleQueue):
        def put(self, item: object) -> None:
            if isinstance(item, tuple) and len(item) == 2:  # pictures on their way
                raise MemoryError
            super().put(item)

    with monkeypatch.context() as patch:
        patch.setattr(queue, "SimpleQueue", Full)
        assert main(run.argv()) == 130
    finish(run)


def test_a_session_that_cannot_report_costs_its_figures(run, monkeypatch):
    real = FaultySession.report
    monkeypatch.setattr(FaultySession, "report", lambda self: real(self) if not self.items else 1 // 0)
    assert main(run.argv()) == 0
    run.check()


def test_a_thread_of_the_worker_that_dies_is_told_to_the_parent(monkeypatch):
    ours, theirs = Pipe()
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    lives: tuple[Any, ...] = (lambda: 1 // 0, lambda: (_ for _ in ()).throw(MemoryError()))
    for life in lives:
        with pytest.raises(SystemExit):
            Worker(theirs).ends_with(life)
        assert isinstance(ours.recv(), Broken)


def test_a_process_that_is_refused_is_one_line(run, monkeypatch, capfd):
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert main([*run.argv(), "executor=process"]) == 2
    err = capfd.readouterr().err
    assert "the worker process cannot be started (Resource temporarily unavailable): raise the limit" in err
    assert len(err.strip().splitlines()) == 1
    assert not run.run_dir.exists()


def test_two_signals_end_it_where_no_thread_counts_them(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError(REFUSED)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(SystemExit, match="130"):
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_broken_item_folder_costs_its_item(run, tmp_path, capfd):
    assert main(run.argv()) == 0
    one, other = (run.run_dir / "items/00000_a_cat" / f"seed_{n}" for n in range(2))
    shutil.rmtree(one)
    one.write_text("no folder", encoding="utf-8")
    shutil.rmtree(other)
    other.symlink_to(tmp_path)
    assert main(run.argv()) == 1
    err = capfd.readouterr().err
    assert f"cannot write {one.relative_to(run.run_dir)}" in err
    assert f"{other.relative_to(run.run_dir)} is a link" in err
    assert Path(one).read_text(encoding="utf-8") == "no folder"
    one.unlink()
    other.unlink()
    assert main(run.argv()) == 0
    ledger = Ledger.load(run.run_dir / "records.jsonl")
    assert all(entry.ok for entry in ledger.entries.values())
    assert len(ledger.entries) == 4


def test_a_byte_of_the_ledger_costs_its_item(run):
    assert main(run.argv()) == 0
    records = run.run_dir / "records.jsonl"
    text = records.read_bytes()
    place = text.index(b'"fingerprint":"') + 20
    records.write_bytes(text[:place] + (b"0" if text[place : place + 1] != b"0" else b"1") + text[place + 1 :])
    assert main([*run.argv(), "dry_run=true"]) == 0
    assert main(run.argv()) == 0
    assert json.loads((run.run_dir / "summary.json").read_bytes())["items"]["ok"] == 1


def test_a_lost_record_is_drawn_again_where_verify_is_asked_for(run):
    assert main(run.argv()) == 0
    record = run.run_dir / "items/00000_a_cat/seed_1/record.json"
    record.write_bytes(record.read_bytes()[:40])
    assert main([*run.argv(), "verify=true"]) == 0
    assert json.loads(record.read_bytes())["seed"] == 1


def test_the_extra_picture_is_there_before_its_line(run, monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise DiskError("the power is gone")

    words = [word for word in run.argv() if not word.startswith(("prompts.texts", "seeds"))]
    words += ["prompt=a cat", "seeds=[1]", f"output_file={tmp_path}/cat.png"]
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", fail)
        assert main(words) == 130
    assert (tmp_path / "cat.png").is_file()
    assert main([f"resume={run.run_dir}"]) == 0
    # Asked for when all is drawn, and where the picture is another run's.
    assert main([f"resume={run.run_dir}", f"output_file={tmp_path}/again.png"]) == 0
    again = [w.replace(str(run.run_dir), f"{tmp_path}/second").replace("cat.png", "linked.png") for w in words]
    assert main([*again, f"skip_existing={run.run_dir}"]) == 0
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("cat", "again", "linked")]
    assert pictures == [pictures[0]] * 3


@pytest.mark.parametrize("output", ["folders", "shards"])
def test_an_extra_picture_that_cannot_be_written_is_named(run, monkeypatch, tmp_path, capfd, output):
    """And not the item's folder, which is whole."""
    replace = atomic.replace_file

    def full(path: Path, data: bytes, **options: object) -> None:
        if path.name == "cat.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(path, data, **options)  # pyright: ignore[reportArgumentType]

    words = [word for word in run.argv() if not word.startswith(("prompts.texts", "seeds"))]
    words += ["prompt=a cat", "seeds=[1]", f"output={output}"]
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replace_file", full)
        assert main([*words, f"output_file={tmp_path}/cat.png"]) == 130
    told = f"output_file={tmp_path}/cat.png (No space left on device): resume with another output_file=FILE"
    assert f"stopped: cannot write {told}" in capfd.readouterr().err
    assert main([f"resume={run.run_dir}", f"output_file={tmp_path}/dog.png"]) == 0
    assert (tmp_path / "dog.png").is_file()


def test_what_is_not_asked_for_is_told_and_not_done(run, capfd):
    assert main(run.argv()) == 0
    records = run.run_dir / "records.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:1]))
    capfd.readouterr()
    assert main([*run.argv(), "retry=failed", "dry_run=true"]) == 0
    assert "4 pictures of 2 prompts; 1 is done, 3 are not asked for (retry=failed), 0 remain" in capfd.readouterr().out
    assert main([*run.argv(), "retry=failed"]) == 130
    assert "3 were never drawn and are not asked for (retry=failed)" in capfd.readouterr().err
    finish(run)
    assert main([*run.argv(), "retry=failed"]) == 0


def test_pictures_that_exist_are_told_of_and_foreseen(run, tmp_path, capfd):
    first = run.argv()
    assert main(first) == 0
    assert "already" not in capfd.readouterr().err
    second = [word.replace(str(run.run_dir), f"{tmp_path}/second") for word in first]
    assert main([*second, f"skip_existing={run.run_dir}", "dry_run=true"]) == 0
    assert "4 are in skip_existing and linked" in capfd.readouterr().out
    assert main(second) == 0
    told = f"4 of these pictures are in {os.path.relpath(run.run_dir)} already: skip_existing="
    assert told in capfd.readouterr().err


def test_start_or_continue(run, tmp_path, capfd):
    words = [word for word in run.argv() if not word.startswith("hydra.run.dir")]
    begun = [*words, f"continue={run.run_dir}"]
    assert main(begun) == 0
    run.check()
    capfd.readouterr()
    assert main(begun) == 0
    assert "nothing to draw: 4 pictures are done" in capfd.readouterr().err
    for wrong in (["continue="], ["continue=latest"], [f"continue={tmp_path}", "resume=latest"]):
        assert main([*words, *wrong]) == 2
        assert "continue=" in capfd.readouterr().err
    sweep = ["-m", "prompt=a cat", "seeds=1,2", "output.min_free_gb=0", "warmup=none", f"continue={tmp_path}/sweep"]
    assert main(sweep) == 0
    assert main(sweep) == 0
    assert capfd.readouterr().err.count("nothing to draw: 1 picture is done") == 2
