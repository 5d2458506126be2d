"""Reading GPU memory at an interval, and rebuilding the session when it is too much."""

from __future__ import annotations

import logging

import pytest

from tests.support.drawing import SMALL, draw
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import Action, Health, HealthCheck, Resident


def reader(*reserved: float):
    values = iter(reserved)
    return lambda: {"reserved_gb": next(values), "allocated_gb": 1.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_reads_at_the_interval_and_not_between():
    clock = Clock()
    check = HealthCheck(Health(interval_seconds=600), reader(10.0, 11.0), clock)
    first = check.poll()
    assert first is not None
    assert first.memory["reserved_gb"] == 10.0
    clock.now = 599.0
    assert check.poll() is None
    clock.now = 600.0
    second = check.poll()
    assert second is not None
    assert second.memory["reserved_gb"] == 11.0


def test_without_a_gpu_there_is_nothing_to_read():
    assert HealthCheck(Health(interval_seconds=0), dict).poll() is None


@pytest.mark.parametrize(
    ("reserved", "action", "recycle", "warns"),
    [
        (31.9, Action.recycle, False, False),
        (32.1, Action.recycle, True, True),
        (32.1, Action.warn, False, True),
    ],
)
def test_threshold(reserved, action, recycle, warns, caplog):
    check = HealthCheck(Health(max_reserved_gb=32, action=action), reader(reserved))
    with caplog.at_level(logging.WARNING):
        reading = check.poll()
    assert reading is not None
    assert reading.recycle is recycle
    assert ("above memory.health.max_reserved_gb=32" in caplog.text) is warns


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"interval_seconds": -1}, "interval_seconds=-1"),
        ({"interval_seconds": float("nan")}, "interval_seconds=nan"),
        ({"max_reserved_gb": 0}, "max_reserved_gb=0"),
        ({"action": Action.recycle}, "needs a threshold"),
    ],
)
def test_bad_settings(fields, says):
    with pytest.raises(UserError, match=says):
        Health(**fields)


def test_a_recycled_session_draws_the_same_pictures(monkeypatch, caplog):
    """The engine is rebuilt before every batch here, and no picture notices."""
    plain = draw(Resident(), params=SMALL)
    monkeypatch.setattr("zimage_runner.memory.health.gpu_memory", lambda: {"reserved_gb": 40.0})
    health = Health(interval_seconds=0, max_reserved_gb=32, action=Action.recycle)
    with caplog.at_level(logging.WARNING):
        assert draw(Resident(health=health), params=SMALL) == plain
    assert "rebuilding the session" in caplog.text
