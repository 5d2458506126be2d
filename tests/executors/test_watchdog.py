"""``executor.item_timeout_s`` of this process: a picture that takes too long is failed and named, and the run ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.fault_runs import Run
from tests.support.faulty_session import FaultySession, item, picture
from zimage_runner.engines.base import GeneratedBatch, PendingImages
from zimage_runner.errors import UserError
from zimage_runner.executors.base import Batch
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.plan import WorkItem

LIMIT = 0.05


class Stuck(PendingImages):
    """Pictures of a device that has stopped working."""

    def __init__(self, until: threading.Event) -> None:
        self.until = until

    def wait(self) -> np.ndarray:
        assert self.until.wait(30)
        return np.stack([picture("a cat", 0)])


@pytest.fixture
def told() -> tuple[threading.Event, list[tuple[list[int], str]]]:
    return threading.Event(), []


@pytest.mark.parametrize("where", ["generate", "wait"])
@pytest.mark.parametrize("count", [1, 2])
def test_who_takes_too_long_is_told_once(monkeypatch, told, where, count):
    """Also where the call returns at once and it is the device that hangs; the first batch is the culprit."""
    heard, found = told

    def generate(self: FaultySession, items: Sequence[WorkItem], **_: object) -> GeneratedBatch:
        if where == "generate":
            assert heard.wait(30)
        return GeneratedBatch(images=Stuck(heard))

    def on_overdue(items: Sequence[WorkItem], reason: str) -> None:
        found.append(([i.seed for i in items], reason))
        heard.set()

    monkeypatch.setattr(FaultySession, "generate", generate)
    executor = InlineExecutorConfig(item_timeout_s=LIMIT).create(FaultySession)
    executor.start()
    executor.on_overdue = on_overdue
    batches = [Batch(items=[item(n + seed) for seed in range(count)]) for n in (0, 10)]
    for result in executor.run(batches):
        assert result.images is not None
        result.images.wait()
    executor.close()
    limit = f"executor.item_timeout_s={LIMIT}"
    why = f"took longer than {limit}" if count == 1 else f"a batch of 2 took longer than 2 x {limit}"
    assert found == [(list(range(count)), why)]


def test_what_is_in_time_is_left_alone(told):
    heard, _ = told
    executor = InlineExecutorConfig(item_timeout_s=30).create(FaultySession)
    executor.start()
    executor.on_overdue = lambda *_: heard.set()
    assert len(list(executor.run([Batch(items=[item(n)]) for n in range(5)]))) == 5
    executor.close()
    assert not heard.is_set()


def test_a_thread_that_is_refused_costs_the_limit_alone(monkeypatch, caplog):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    executor = InlineExecutorConfig().create(FaultySession)
    executor.start()
    executor.on_overdue = lambda *_: None
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert len(list(executor.run([Batch(items=[item(n)]) for n in range(3)]))) == 3
    assert caplog.text.count("executor.item_timeout_s is not kept") == 1


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(UserError, match=r"executor.item_timeout_s=.* is out of range"):
        InlineExecutorConfig(item_timeout_s=limit)


@pytest.mark.parametrize("last", [False, True])
def test_a_run_whose_engine_blocks_for_ever(tmp_path, last):
    """It ends by itself; what was drawn before is kept; the next start draws the rest, the one that hung as well."""
    run = Run(tmp_path, seeds=3, overrides=["executor.item_timeout_s=0.5"])
    seed = 2 if last else 1
    hang = {"on": seed, "kind": "hang", "after": 1 if last else 0, "times": 1}
    assert run.execute(hang) == (1 if last else 130)
    run.check(complete=False)
    item_dir = f"items/{'00001_一只猫' if last else '00000_a_cat'}/seed_{seed}"
    summary = json.loads((run.run_dir / "summary.json").read_bytes())
    assert summary["failed"] == [{"item": item_dir, "error": "took longer than executor.item_timeout_s=0.5"}]
    assert summary["items"]["ok"] == (5 if last else 1)
    advice = f"{item_dir}: took longer than executor.item_timeout_s=0.5, and cannot be given up in this process: resume"
    assert advice in run.log
    assert "executor=process" in run.log
    assert f"resume={run.run_dir}" in run.log
    assert "Traceback" not in run.log
    assert run.execute() == 0
    run.check()
