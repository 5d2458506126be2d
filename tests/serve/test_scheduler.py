"""The model's life: warm at the configured shapes, and what happens where none can be had."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.faulty_session import item
from tests.support.serving import served, settings
from zimage_runner.errors import UserError
from zimage_runner.executors.base import Batch
from zimage_runner.prompts.inline import Inline
from zimage_runner.serve.run_files import FOLDER
from zimage_runner.serve.scheduler import Place, Scheduler
from zimage_runner.serve.turns import Turns
from zimage_runner.warmup import Generate


def shapes(**options) -> list[tuple[str, bool]]:
    given = settings("executor=inline", **options)
    return [(shape.label, shape.whole) for shape in given.shapes(given.plan(Inline(texts=["a"]), 0))]


def test_it_is_warm_at_the_configured_shapes():
    assert shapes() == [("128x128 c32", True), ("128x128 c64", False), ("128x128 c128", False)]
    assert shapes(warm_sizes=["64x32"], warm_caption_tokens=[1], batch_size=4) == [
        ("128x128 c32", True), ("128x128 b4 c32", True), ("64x32 c32", True), ("64x32 b4 c32", True),
    ]  # fmt: skip
    with pytest.raises(UserError, match="height=33 is not a positive multiple"):
        shapes(warm_sizes=["32x33"])


def test_it_warms_by_drawing_unless_told_otherwise():
    assert isinstance(settings("executor=inline").config.warmup, Generate)


def test_a_model_that_is_not_there_ends_the_service(monkeypatch):
    def missing() -> None:
        raise UserError("model.path=/nowhere: no such directory")

    monkeypatch.setattr("zimage_runner.serve.settings.Settings.executor", lambda self: missing())
    with served(starts=False) as client, client:
        scheduler = client.service.scheduler  # pyright: ignore[reportAttributeAccessIssue]
        assert scheduler.gave_up.wait(60)
        assert scheduler.refused
    assert not Path("outputs", FOLDER).exists(), "nothing is left behind"


def test_a_run_and_requests_take_turns_where_both_wait():
    scheduler = Scheduler(lambda: pytest.fail("not started"), most_waiting=9, largest_batch=1, on_overdue=print)
    orders = [SimpleNamespace(waiting=deque(Place(item(n + k)) for k in (0, 1)), begin=lambda: None) for n in (10, 20)]
    for order in orders:
        scheduler.submit(order)  # pyright: ignore[reportArgumentType]
    turns = Turns(scheduler)
    for seed in range(6):
        scheduler.add_run_batch(Batch(items=[item(seed)]), turns)
    assert [scheduler._next().items[0].seed for _ in range(10)] == [10, 0, 20, 1, 11, 2, 21, 3, 4, 5]


@pytest.mark.parametrize(
    ("fault", "refused", "text"),
    [
        ({"on": "start", "kind": "refuse"}, True, "model.path=/nowhere has no model_index.json"),
        ({"on": "start", "kind": "raise", "text": "no such device"}, False, "ValueError: no such device"),
    ],
)
def test_a_first_model_that_cannot_be_started_ends_the_service(monkeypatch, fault, refused, text):
    monkeypatch.setenv("FAULTS", json.dumps([fault]))
    with served(starts=False) as client, client:
        scheduler = client.service.scheduler  # pyright: ignore[reportAttributeAccessIssue]
        assert scheduler.gave_up.wait(60)
        assert (scheduler.refused, scheduler.trouble) == (refused, text)
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, text)
