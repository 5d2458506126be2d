"""What lives in a worker process of executor=ray, here without Ray and in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faulty_session import FaultySession, item, picture
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.executors.base import Batch, Written
from zimage_runner.executors.fleet import Part
from zimage_runner.executors.messages import Start
from zimage_runner.executors.ray_actor import Drawer, Drawn, differences, software


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A worker has its process for itself."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    logger = logging.getLogger("zimage_runner")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def drawer(faults) -> Drawer:
    faults()
    made = Drawer(4)
    answer = made.start(Start(FaultySession, False))
    assert (answer.refused, answer.broken) == (None, None)
    assert answer.report["numerics"] == {"engine": "faulty"}
    return made


def draw(drawer: Drawer, *seeds: int, attempt: int = 1) -> Drawn:
    drawer.draw(7, Batch(items=[item(seed) for seed in seeds], attempt=attempt))
    return drawer.collect(7)


def parts(drawn: Drawn) -> list[Part]:
    assert drawn.done is not None
    assert drawn.done.ticket == 7
    return drawn.done.parts


class Sink:
    """Notes what it shall write."""

    def __init__(self, error: Exception | None = None, *, is_seen: bool = True) -> None:
        self.error, self.is_seen = error, is_seen
        self.details: dict[str, Any] = {}

    def open(self) -> None:
        if not self.is_seen:
            raise UserError("/run is not to be seen here")

    def write(self, items: Sequence[Any], pixels: np.ndarray, details: dict[str, Any], attempt: int) -> list[Written]:
        if self.error is not None:
            raise self.error
        self.details = details
        return [Written(status="ok", line={"seed": i.seed}) for i in items]


def test_pictures_come_back_with_what_happened(drawer):
    (part,) = parts(draw(drawer, 1, 2))
    assert part.positions == [0, 1]
    assert part.pixels is not None
    assert np.array_equal(part.pixels, np.stack([picture("a cat", 1), picture("a cat", 2)]))
    assert part.details["worker"].startswith("worker 4 on ")
    assert part.details["batch_size"] == 2


def test_errors_and_bad_pictures_are_their_items(drawer, faults):
    faults({"on": 1, "kind": "raise", "text": "no"}, {"on": 3, "kind": "nan"})
    found = {part.positions[0]: part for part in parts(draw(drawer, 1, 2, 3))}
    assert (found[0].error, found[0].bad_picture) == ("ValueError: no", False)
    assert found[1].pixels is not None
    assert (found[2].error, found[2].bad_picture) == ("the decoder's output holds NaN or Inf", True)


def test_a_lost_device_ends_the_worker(drawer, faults):
    faults({"on": 1, "kind": "lost"})
    drawn = draw(drawer, 1)
    assert drawn.done is None
    assert "the GPU can no longer be used" in (drawn.broken or "")


def test_steps_down_are_told_once(drawer, faults):
    faults({"on": 1, "kind": "oom", "above": 1})
    done = draw(drawer, 1, 2).done
    assert done is not None
    assert done.steps == ["out of memory with 2 pictures of 32x32: 1 at a time from now on"]
    again = draw(drawer, 1, 2).done
    assert again is not None
    assert again.steps == []


def test_it_writes_where_it_sees_the_directory(drawer):
    sink = Sink()
    drawer.equip(sink, must=False)
    (part,) = parts(draw(drawer, 1, 2))
    assert part.pixels is None
    assert part.written == [Written(status="ok", line={"seed": n}) for n in (1, 2)]
    assert sink.details["worker"].startswith("worker 4 on ")
    drawer.equip(None, must=False)
    assert parts(draw(drawer, 1))[0].pixels is not None


def test_where_it_does_not_it_sends_or_the_run_stops(drawer):
    drawer.equip(Sink(is_seen=False), must=False)
    assert parts(draw(drawer, 1))[0].pixels is not None
    drawer.equip(Sink(is_seen=False), must=True)
    assert draw(drawer, 1).stopped == "/run is not to be seen here"


def test_so_does_what_no_worker_could_draw(drawer, faults):
    faults({"on": 1, "kind": "refuse"}, {"on": "extend", "kind": "refuse"})
    why = "model.path=/nowhere has no model_index.json"
    assert (draw(drawer, 1).stopped, drawer.extend([], []).refused) == (why, why)


def test_a_full_disk_stops_the_run(drawer):
    drawer.equip(Sink(RunStopped("cannot write (No space left on device)")), must=True)
    drawn = draw(drawer, 1)
    assert (drawn.stopped, drawn.broken) == ("cannot write (No space left on device)", None)


@pytest.mark.parametrize(("kind", "field"), [("refuse", "refused"), ("raise", "broken")])
def test_a_session_that_cannot_start_says_why(faults, kind, field):
    faults({"on": "start", "kind": kind, "text": "no"})
    answer = Drawer(1).start(Start(FaultySession, False))
    expected = {"refused": "model.path=/nowhere has no model_index.json", "broken": "ValueError: no"}
    assert getattr(answer, field) == expected[field]


def test_relative_names_start_where_the_run_was_started(tmp_path, monkeypatch):
    (tmp_path / "driver").mkdir()
    for folder, here in ((tmp_path / "driver", tmp_path / "driver"), (tmp_path / "on another node", tmp_path)):
        monkeypatch.chdir(tmp_path)
        assert Drawer(1).start(Start(FaultySession, False, str(folder))).broken is None
        assert Path.cwd() == here


def test_its_log_lines_travel_with_the_answers(drawer):
    logging.getLogger("zimage_runner.engines").warning("look at %s", "this")
    drawn = draw(drawer, 1)
    assert (logging.WARNING, "zimage_runner.engines", "look at this") in drawn.lines
    assert not draw(drawer, 1).lines


def test_software_that_differs_is_named():
    here = software()
    assert here["torch"][0].isdigit()
    assert differences(here, dict(here)) == []
    there = here | {"torch": "1.0", "zimage_runner": "0.0.1 (abc)"}
    del there["python"]
    told = differences(here, there)
    assert f"torch 1.0 there, {here['torch']} here" in told
    assert f"python unknown there, {here['python']} here" in told
    assert len(told) == 3
