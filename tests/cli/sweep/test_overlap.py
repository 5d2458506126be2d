"""A multirun's job ends while the next one draws: nothing waits, and nothing of one gets into the other."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.faulty_session import FaultySession
from zimage_runner.engines.base import GeneratedBatch, PendingImages
from zimage_runner.errors import BadPictureError, UserError
from zimage_runner.executors.base import Executor
from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.summary import Summary
from zimage_runner.outputs.writer import Outcome, Writer, WriteRequest
from zimage_runner.plan import WorkItem
from zimage_runner.runner import execute as runner
from zimage_runner.runner.loop import GenerationLoop
from zimage_runner.runner.pool import Lease, SharedExecutor
from zimage_runner.runner.run import Run
from zimage_runner.signals import StopRequest

Cli = Callable[..., tuple[int, str, str]]
PATIENCE = 20.0
"""Seconds after which a picture that waits for the next job gives up: then they did not overlap."""
SWEEP = ("-m", "prompt=a cat", "output.fsync=never", "hydra.callbacks.sweep_report.grid=false")


class Gpu:
    """Work that takes until the next batch has been submitted; the last batch waits for nothing."""

    def __init__(self, batches: int) -> None:
        self.submitted = [threading.Event() for _ in range(batches)]
        self.count = 0
        self.bad: set[int] = set()
        """Batches whose pictures turn out to be none."""
        self.gave_up: list[int] = []


class OnGpu(PendingImages):
    def __init__(self, gpu: Gpu, number: int, images: PendingImages, waits: bool) -> None:
        self._gpu, self._number, self._images, self._waits = gpu, number, images, waits

    def wait(self) -> np.ndarray:
        after = self._number + 1
        if self._waits and after < len(self._gpu.submitted) and not self._gpu.submitted[after].wait(PATIENCE):
            self._gpu.gave_up.append(self._number)
        if self._number in self._gpu.bad:
            raise BadPictureError("the decoder's output holds NaN or Inf")
        return self._images.wait()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Gpu]:
    """Make sessions queue their work on a pretended GPU that is given so many batches."""

    def begin(batches: int) -> Gpu:
        gpu = Gpu(batches)

        class Session(FaultySession):
            def generate(self, items: Sequence[WorkItem], **options: Any) -> GeneratedBatch:
                done = super().generate(items, **options)
                number, gpu.count = gpu.count, gpu.count + 1
                gpu.submitted[number].set()
                waits = options.get("attempt", 1) == 1  # a second attempt is at the end of the queue
                return GeneratedBatch(images=OnGpu(gpu, number, done.images, waits), details=done.details)

        monkeypatch.setattr("zimage_runner.runner.pool.Session", Session)
        return gpu

    return begin


def sweep_of(out: str) -> Path:
    return Path(out.strip().splitlines()[-1])


def rows(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open() as table:
        return list(csv.DictReader(table))


def test_the_next_job_begins_before_the_last_pictures_are_there(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    queue = gpu(4)
    code, out, err = cli(*SWEEP, "seeds=1,2,3,4")
    assert code == 0, err
    assert queue.gave_up == []
    sweep = sweep_of(out)
    assert [row["status"] for row in rows(sweep)] == ["complete"] * 4
    for job in range(4):
        summary = json.loads((sweep / str(job) / "summary.json").read_bytes())
        assert summary["items"] == {
            "planned": 1, "done_before": 0, "linked": 0, "ok": 1, "failed": 0, "remaining": 0,
        }  # fmt: skip
        log = (sweep / str(job) / "run.log").read_text(encoding="utf-8")
        assert log.count("the run ended") == log.count("of 1 picture to draw") == 1
    assert out.splitlines()[:-1] == [str(sweep / str(job)) for job in range(4)]


def test_a_picture_takes_from_the_one_before_it(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    """And not from when it was queued behind that one."""
    queue = gpu(2)
    real, arrivals, first_arrived = Writer._write_picture, [], threading.Event()

    def write(self: Writer, job: Any, pixels: Any, seconds: float, since: float, arrived: float) -> None:
        arrivals.append(arrived)
        first_arrived.set()
        real(self, job, pixels, seconds, since, arrived)

    class OneAfterAnother(OnGpu):
        def wait(self) -> np.ndarray:
            pixels = super().wait()
            if self._number == 1:
                assert first_arrived.wait(PATIENCE)
            return pixels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "_write_picture", write)
        patch.setitem(globals(), "OnGpu", OneAfterAnother)
        _, out, _ = cli(*SWEEP, "seeds=1,2")
    assert queue.gave_up == []
    second = sweep_of(out) / "1"
    record = json.loads(next(second.glob("items/*/*/record.json")).read_bytes())
    images = json.loads((second / "summary.json").read_bytes())["images"]
    assert images["first_seconds"] <= arrivals[1] - arrivals[0] + 1e-6
    assert record["seconds"] <= arrivals[1] - arrivals[0] + 1e-6


def test_a_bad_picture_is_drawn_again_while_the_next_job_is_under_way(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    queue = gpu(4)
    queue.bad = {0}
    code, out, err = cli(*SWEEP, "seeds=1,2,3")
    assert code == 0, err
    assert queue.gave_up == []
    sweep = sweep_of(out)
    records = [json.loads(next(sweep.glob(f"{job}/items/*/*/record.json")).read_bytes()) for job in range(3)]
    assert [record["attempt"] for record in records] == [2, 1, 1]
    firsts = [json.loads((sweep / str(n) / "summary.json").read_bytes())["images"]["first_seconds"] for n in range(3)]
    assert min(firsts) >= 0
    logs = ["drawing it once more" in (sweep / str(job) / "run.log").read_text(encoding="utf-8") for job in range(3)]
    assert logs == [True, False, False]


def test_each_job_has_its_own_code(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    queue = gpu(4)
    queue.bad = {1, 3}  # the second job's picture, and its second attempt, after the third job's picture
    code, out, err = cli(*SWEEP, "seeds=1,2,3")
    assert code == 1
    assert queue.gave_up == []
    assert [(row["status"], row["failed"]) for row in rows(sweep_of(out))] == [
        ("complete", "0"), ("failures", "1"), ("complete", "0"),
    ]  # fmt: skip
    assert "the decoder's output holds NaN or Inf" in err


def test_a_disk_that_fails_in_one_jobs_end_is_that_jobs_affair(
    cli: Cli, gpu: Callable[[int], Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(3)
    real = Writer._write_picture

    def write(self: Writer, job: Any, *rest: Any) -> None:
        if job.seed == 2:
            raise DiskError("cannot write it")
        real(self, job, *rest)

    monkeypatch.setattr(Writer, "_write_picture", write)
    code, out, err = cli(*SWEEP, "seeds=1,2,3")
    assert code == 130
    assert [row["status"] for row in rows(sweep_of(out))] == ["complete", "stopped", "complete"]
    assert "stopped: cannot write it" in err


def test_jobs_of_another_session_wait(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    queue = gpu(2)
    queue.submitted[1].set()  # the first job must be able to end by itself
    code, out, err = cli(*SWEEP, "seeds=1", "model.dtype=float32,bfloat16")
    assert code == 0, err
    assert [row["status"] for row in rows(sweep_of(out))] == ["complete"] * 2


def test_what_the_job_before_drew_can_be_skipped(cli: Cli, gpu: Callable[[int], Gpu], tmp_path: Path) -> None:
    queue = gpu(1)
    cli("prompt=a dog", "seeds=1", "output.fsync=never", f"output.root={tmp_path}/earlier")
    queue.submitted.append(threading.Event())
    queue.submitted[1].set()
    sweep = tmp_path / "sweep"
    arguments = [
        f"hydra.sweep.dir={sweep}",
        f"skip_existing='{tmp_path}/{{earlier,sweep}}'".replace("{earlier,sweep}", "*"),
    ]
    code, _, err = cli(*SWEEP, "seeds=7", "name=a,b", *arguments)
    assert code == 0, err
    linked = [json.loads((sweep / str(n) / "summary.json").read_bytes())["items"]["linked"] for n in (0, 1)]
    assert linked == [0, 1]
    assert queue.count == 2


def test_with_keep_going_false_the_code_is_known_first(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    queue = gpu(3)
    for submitted in queue.submitted:
        submitted.set()
    queue.bad = {0, 1}
    code, out, _ = cli(*SWEEP, "seeds=1,2", "hydra.launcher.keep_going=false")
    assert code == 1
    assert [row["status"] for row in rows(sweep_of(out))] == ["failures", "not run"]


def test_waiting_for_the_next_job_counts_for_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("zimage_runner.outputs.summary.time", SimpleNamespace(perf_counter=lambda: now))
    totals = []
    for planned in (1, 2):
        now = 100.0
        summary = Summary(tmp_path, planned=planned)
        summary.start_clock()
        now = 103.0
        picture = WriteRequest(item_dir="items/a/seed_1", index=0, seed=1, fingerprint="", recipe={})
        summary.add(Outcome(request=picture, status="ok", arrived=103.0))
        now = 160.0  # the next job was warmed up; the second picture, where there is one, is waited for
        summary.leave_out_wait()
        now = 161.0
        totals.append(summary.to_dict({})["total_seconds"])
    assert totals == [4.0, 61.0]


class Idle(Executor):
    overlaps = True

    def start(self) -> dict[str, Any]:
        return {}

    def run(self, batches: Any) -> Any:
        return iter(())

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("overlaps", "able"), [(False, True), (True, False)])
def test_without_overlap_a_job_ends_at_once(overlaps: bool, able: bool) -> None:
    executor = Idle()
    executor.overlaps = able
    shared = SharedExecutor(StopRequest(), overlaps=overlaps)
    assert shared.finish(Lease(shared, executor), lambda: 7) == 7


def test_a_late_end_comes_once_and_in_order() -> None:
    shared, told = SharedExecutor(StopRequest(), overlaps=True), []
    ends = []

    def end(number: int, code: int) -> int:
        ends.append(number)
        return code

    for number, code in ((1, 0), (2, 130)):
        late = shared.finish(Lease(shared, Idle()), lambda number=number, code=code: end(number, code))
        assert isinstance(late, Future)
        late.add_done_callback(lambda done: told.append(done.result()))
        assert not late.done()
    assert (ends, told) == ([1], [0])
    shared.close()
    shared.finish_previous()
    assert (ends, told) == ([1, 2], [0, 130])
    assert late.result() == 130  # it is known by now


def test_a_late_end_that_is_interrupted_leaves_nobody_waiting() -> None:
    shared = SharedExecutor(StopRequest(), overlaps=True)

    def end() -> int:
        raise KeyboardInterrupt

    late = shared.finish(Lease(shared, Idle()), end)
    assert isinstance(late, Future)
    with pytest.raises(KeyboardInterrupt):
        shared.finish_previous()
    assert isinstance(late.exception(timeout=0), KeyboardInterrupt)
    shared.close()


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (ZeroDivisionError("a bug"), 1)])
def test_what_goes_wrong_late_is_its_own(
    cli: Cli, gpu: Callable[[int], Gpu], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    gpu(3)
    real = GenerationLoop.finish

    def finish(self: GenerationLoop) -> None:
        if self._spec.plan.items[0].seed == 2:
            raise error
        real(self)

    monkeypatch.setattr(GenerationLoop, "finish", finish)
    found, out, err = cli(*SWEEP, "seeds=1,2,3")
    assert found == code
    sweep = sweep_of(out)
    assert [row["status"] for row in rows(sweep)] == [
        "complete",
        "refused" if code == 2 else "complete",
        "complete",
    ]  # its pictures are all there
    assert f"{sweep}/1: " in err
    logs = ["a bug" in (sweep / str(job) / "run.log").read_text(encoding="utf-8") for job in range(3)]
    assert logs == [False, code == 1, False]
    gpu(3)
    monkeypatch.setattr(GenerationLoop, "finish", real)
    found, _, err = cli(f"resume={sweep}")
    assert found == 0, err
    assert [row["status"] for row in rows(sweep)] == ["complete"] * 3  # a summary that was never written is, now
    assert "nothing to draw" in err


def test_callbacks_see_a_code_that_is_not_known_yet(cli: Cli, gpu: Callable[[int], Gpu]) -> None:
    gpu(2)
    callbacks = "hydra.experimental.callbacks"
    code, out, err = cli(
        *SWEEP, "seeds=1,2", "hydra.output_subdir=.settings",
        f"+hydra.callbacks.pickle._target_={callbacks}.PickleJobInfoCallback",
        f"+hydra.callbacks.told._target_={callbacks}.LogJobReturnCallback",
    )  # fmt: skip
    assert code == 0, err
    for job in range(2):
        pickled = pickle.loads((sweep_of(out) / str(job) / ".settings" / "job_return.pickle").read_bytes())
        assert str(pickled.return_value) == "not known yet"


def test_two_jobs_write_one_output_file_one_after_the_other(
    cli: Cli, gpu: Callable[[int], Gpu], tmp_path: Path
) -> None:
    queue = gpu(2)
    queue.submitted[1].set()
    code, out, err = cli(*SWEEP, "output_file=here.png", "seeds=1,2")
    assert code == 0, err
    last = next((sweep_of(out) / "1").glob("items/*/*/image.png"))
    assert (tmp_path / "here.png").read_bytes() == last.read_bytes()


@pytest.mark.parametrize("place", ["plan_run", "report"])
@pytest.mark.parametrize("batches", [[], ["hydra.sweeper.max_batch_size=1"]])
def test_a_signal_ends_what_is_left_of_the_multirun(
    cli: Cli, gpu: Callable[[int], Gpu], monkeypatch: pytest.MonkeyPatch, place: str, batches: list[str]
) -> None:
    """Also of a sweeper that comes with one batch of jobs after the other; and the table is there."""
    queue = gpu(4)
    for submitted in queue.submitted:
        submitted.set()
    owner: Any = runner if place == "plan_run" else Run
    real, visits = getattr(owner, place), []

    def visit(*args: Any) -> Any:
        visits.append(place)
        if len(visits) == (2 if place == "plan_run" else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(owner, place, visit)
    code, out, err = cli(*SWEEP, *batches, "seeds=1,2,3,4")
    assert code == 130
    assert err.count("to finish the whole multirun") == 1
    statuses = [row["status"] for row in rows(sweep_of(out))]
    assert statuses[0] == "complete"
    assert statuses[-1] == "not run"
    assert cli(f"resume={sweep_of(out)}")[0] == 0
    assert [row["status"] for row in rows(sweep_of(out))] == ["complete"] * 4
    assert queue.count == 4
