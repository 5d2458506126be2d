from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.written_runs import noise_pictures, open_run, request
from zimage_runner.engines.base import PendingImages, ReadyImages
from zimage_runner.errors import BadPictureError, RunStopped
from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.ledger import Ledger


class Gate(PendingImages):
    """Pictures that arrive when told."""

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = pictures
        self.open = threading.Event()

    def wait(self) -> np.ndarray:
        assert self.open.wait(60)
        return self.pictures


class Broken(PendingImages):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait(self) -> np.ndarray:
        raise self.error


class HandsNothingOn:
    """A queue to which threads other than the main one cannot hand the end on."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.get = queue.get

    def put(self, task: object) -> None:
        if task is None and threading.current_thread() is not threading.main_thread():
            raise MemoryError
        self.queue.put(task)


def files(path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {".lock"}


@pytest.mark.parametrize("fsync", ["never", "run", "item"])
def test_a_batch_becomes_pictures_records_and_ledger_lines(tmp_path, fsync):
    from zimage_runner.outputs.config import Fsync

    pictures = noise_pictures(3)
    with open_run(tmp_path, fsync=Fsync[fsync]) as run:
        requests = [request(seed, details={"timings": {"total": 1.5}, "host": "h"}) for seed in range(3)]
        run.writer.submit(requests, ReadyImages(pictures))
        run.writer.close()
    assert sorted(o.request.seed for o in run.outcomes) == [0, 1, 2]
    ledger = Ledger.load(tmp_path / "records.jsonl")
    for seed, picture in enumerate(pictures):
        folder = tmp_path / f"items/0000_a/seed_{seed}"
        png = (folder / "image.png").read_bytes()
        assert np.array_equal(np.asarray(Image.open(folder / "image.png")), picture)
        record = json.loads((folder / "record.json").read_bytes())
        assert record["status"] == "ok"
        assert record["sha256"] == hashlib.sha256(png).hexdigest() == ledger.entries[requests[seed].item_dir].sha256
        assert record["pixels_sha256"] == hashlib.sha256(picture.tobytes()).hexdigest()
        assert record["bytes"] == len(png) == ledger.entries[requests[seed].item_dir].size
        assert record["timings"] == {"total": 1.5}
        assert record["prompt"] == "a cat"
        assert ledger.entries[requests[seed].item_dir].fingerprint == "f" * 16
    assert files(tmp_path) == {"records.jsonl"} | {
        f"items/0000_a/seed_{s}/{f}" for s in range(3) for f in ("image.png", "record.json")
    }


@pytest.mark.parametrize(("fsync", "files", "systems"), [("never", 0, 0), ("run", 0, 1), ("item", 7, 0)])
def test_what_each_fsync_policy_forces_to_disk(tmp_path, monkeypatch, fsync, files, systems):
    from zimage_runner.outputs import atomic
    from zimage_runner.outputs.config import Fsync

    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("file"))
    monkeypatch.setattr(atomic, "sync_filesystem", lambda fd: calls.append("system"))
    with open_run(tmp_path, fsync=Fsync[fsync]) as run:
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        run.writer.flush()
        assert "system" not in calls
    # item: the names of three new folders, picture, record, both names, the ledger's line.
    assert (calls.count("file"), calls.count("system")) == (files, systems)


def test_the_file_system_is_really_synchronised(tmp_path):
    from zimage_runner.outputs import atomic

    with atomic.directory(tmp_path) as fd:
        atomic.sync_filesystem(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        atomic.sync_filesystem(fd)


def test_the_same_item_gives_the_same_file_whatever_happened_around_it(tmp_path):
    digests = set()
    for n, details in enumerate([{"timings": {"total": 1.0}}, {"timings": {"total": 9.0}, "attempts": 2}]):
        with open_run(tmp_path / str(n)) as run:
            run.writer.submit([request(details=details)], ReadyImages(noise_pictures()))
            run.writer.close()
            digests.add(run.outcomes[0].sha256)
    assert len(digests) == 1


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (9, 8, 7)])
def test_constant_pictures_are_bad_unless_allowed(tmp_path, colour):
    flat = np.full((1, 32, 48, 3), colour, dtype=np.uint8)
    with open_run(tmp_path / "refused") as run:
        run.writer.submit([request()], ReadyImages(flat))
        run.writer.flush()
        assert [o.status for o in run.outcomes] == ["bad"]
        assert "one colour" in (run.outcomes[0].error or "")
        assert files(tmp_path / "refused") == {"records.jsonl"}
    with open_run(tmp_path / "allowed", allow_constant=True) as run:
        run.writer.submit([request()], ReadyImages(flat))
        run.writer.flush()
        assert [o.status for o in run.outcomes] == ["ok"]


def test_only_the_constant_picture_of_a_batch_is_bad(tmp_path):
    pictures = noise_pictures(3)
    pictures[1] = 0
    with open_run(tmp_path) as run:
        run.writer.submit([request(s) for s in range(3)], ReadyImages(pictures))
        run.writer.flush()
        assert {o.request.seed: o.status for o in run.outcomes} == {0: "ok", 1: "bad", 2: "ok"}


def test_nan_and_lost_pictures_are_reported_per_item(tmp_path):
    with open_run(tmp_path) as run:
        run.writer.submit([request(1), request(2)], Broken(BadPictureError("NaN in the picture")))
        run.writer.submit([request(3)], Broken(RuntimeError("device gone")))
        run.writer.flush()
        assert sorted((o.request.seed, o.status, o.error) for o in run.outcomes) == [
            (1, "bad", "BadPictureError: NaN in the picture"),
            (2, "bad", "BadPictureError: NaN in the picture"),
            (3, "bad", "RuntimeError: device gone"),
        ]


def test_a_batch_of_the_wrong_length_hangs_nothing(tmp_path):
    with open_run(tmp_path) as run:
        run.writer.submit([request(1), request(2)], ReadyImages(noise_pictures(3)))
        run.writer.flush()
        assert {o.error for o in run.outcomes} == {"RuntimeError: 2 pictures were announced, 3 came"}


def test_a_failure_reported_while_closing_is_written(tmp_path):
    with open_run(tmp_path) as run:
        gate = Gate(np.zeros((1, 32, 48, 3), dtype=np.uint8))
        run.writer._on_done = lambda o: run.writer.fail(o.request, "bad twice") if o.status == "bad" else None
        run.writer.submit([request()], gate)
        threading.Timer(0.1, gate.open.set).start()
        run.writer.close()
    assert not Ledger.load(tmp_path / "records.jsonl").entries["items/0000_a/seed_1"].ok


def test_failure_is_recorded_and_leaves_no_picture(tmp_path):
    with open_run(tmp_path) as run:
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        run.writer.flush()
        run.writer.fail(request(details={"attempts": 2}), "ValueError: no")
        run.writer.flush()
    assert files(tmp_path) == {"records.jsonl", "items/0000_a/seed_1/record.json"}
    record = json.loads((tmp_path / "items/0000_a/seed_1/record.json").read_text(encoding="utf-8"))
    assert (record["status"], record["error"], record["attempts"]) == ("failed", "ValueError: no", 2)
    assert not Ledger.load(tmp_path / "records.jsonl").entries["items/0000_a/seed_1"].ok


def test_a_picture_may_be_retried_and_the_last_result_counts(tmp_path):
    with open_run(tmp_path) as run:
        run.writer.fail(request(), "once")
        run.writer.flush()
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        run.writer.close()
    assert Ledger.load(tmp_path / "records.jsonl").entries["items/0000_a/seed_1"].ok


def test_output_file_is_written_too(tmp_path):
    target = tmp_path / "cat.png"
    with open_run(tmp_path / "run") as run:
        run.writer.submit([request(output_file=str(target))], ReadyImages(noise_pictures()))
        run.writer.close()
    assert target.read_bytes() == (tmp_path / "run/items/0000_a/seed_1/image.png").read_bytes()


def test_submit_waits_when_too_many_pictures_are_pending(tmp_path):
    with open_run(tmp_path, max_pending_images=2) as run:
        gates = [Gate(noise_pictures(seed=n)) for n in range(4)]
        submitted = []

        def feed() -> None:
            for n, gate in enumerate(gates):
                run.writer.submit([request(n)], gate)
                submitted.append(n)

        feeder = threading.Thread(target=feed)
        feeder.start()
        time.sleep(0.1)
        assert submitted == [0, 1]
        for gate in gates:
            gate.open.set()
        feeder.join(60)
        run.writer.flush()
        assert len(run.outcomes) == 4


def test_a_batch_larger_than_the_limit_passes(tmp_path):
    with open_run(tmp_path, max_pending_images=1) as run:
        for n in range(3):
            run.writer.submit([request(s, index=n) for s in range(5)], ReadyImages(noise_pictures(5)))
        run.writer.flush()
        assert len(run.outcomes) == 15


@pytest.mark.parametrize("call", ["write", "rename", "mkdir", "fsync"])
def test_a_disk_fault_stops_everything_and_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    real = getattr(os, call)
    armed = threading.Event()

    def fail(*args, **kwargs):
        if armed.is_set() and threading.current_thread().name.startswith("writer"):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with open_run(tmp_path) as run:
        run.writer.submit([request(0)], ReadyImages(noise_pictures()))
        run.writer.flush()
        monkeypatch.setattr(os, call, fail)
        armed.set()
        run.writer.submit([request(1)], ReadyImages(noise_pictures()))
        with pytest.raises(DiskError, match=r"items/0000_a/seed_1 \(No space left on device: free some space\)"):
            run.writer.flush()
        with pytest.raises(DiskError):
            run.writer.submit([request(2)], ReadyImages(noise_pictures()))
        with pytest.raises(DiskError):
            run.writer.close()
        monkeypatch.undo()
    assert Ledger.load(tmp_path / "records.jsonl").entries.keys() == {"items/0000_a/seed_0"}
    assert not [f for f in files(tmp_path) if f.endswith(".tmp")]


def test_a_deleted_run_directory_stops_the_run(tmp_path):
    import shutil

    with open_run(tmp_path / "run") as run:
        run.writer.submit([request(0)], ReadyImages(noise_pictures()))
        run.writer.flush()
        shutil.rmtree(tmp_path / "run")
        run.writer.submit([request(1)], ReadyImages(noise_pictures()))
        with pytest.raises(DiskError, match="vanished"):
            run.writer.flush()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_that_end_for_want_of_memory_keep_no_other_from_ending(tmp_path, monkeypatch, threads):
    with open_run(tmp_path, writer_threads=threads) as run:
        run.writer.submit([request(0)], ReadyImages(noise_pictures(1)))
        monkeypatch.setattr(run.writer, "_tasks", HandsNothingOn(run.writer._tasks))
        with pytest.raises(RunStopped, match="MemoryError"):
            run.writer.close()
    assert [outcome.status for outcome in run.outcomes] == ["ok"]


def test_an_error_in_the_callback_is_not_swallowed(tmp_path):
    with open_run(tmp_path) as run:
        run.writer._on_done = lambda outcome: (_ for _ in ()).throw(KeyError("callback"))
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        with pytest.raises(RunStopped, match=r"KeyError\('callback'\)"):
            run.writer.flush()


def test_seconds_are_shares_of_the_time_between_arrivals(tmp_path):
    with open_run(tmp_path) as run:
        gate = Gate(noise_pictures(2))
        run.writer.start_clock()
        run.writer.submit([request(0), request(1)], gate)
        time.sleep(0.2)
        gate.open.set()
        run.writer.flush()
        assert [o.seconds for o in run.outcomes] == pytest.approx([0.1, 0.1], abs=0.08)


def test_records_hold_any_text(tmp_path):
    nasty = 'NUL \0, bidi \u202e, quote ", <script>alert(1)</script>, =HYPERLINK("x"), surrogate \ud800, 猫'
    with open_run(tmp_path) as run:
        run.writer.submit([request(prompt=nasty)], ReadyImages(noise_pictures()))
        run.writer.close()
    record = json.loads((tmp_path / "items/0000_a/seed_1/record.json").read_bytes())
    assert record["prompt"] == nasty
    assert "image.png" in {p.name for p in (tmp_path / "items/0000_a/seed_1").iterdir()}
