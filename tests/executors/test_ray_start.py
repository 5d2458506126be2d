"""How a Ray of this machine's own is started: lean, and with everything as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

from zimage_runner.executors.ray_start import BYTECODE, started_lean

pytest.importorskip("ray", reason="Ray is not installed: pip install 'zimage-runner[ray]'")

from ray._private import services
from ray._private.node import Node


def test_what_nobody_uses_is_not_started(monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", None)
    before = services.start_api_server, Node.start_monitor, dict(os.environ)
    with contextlib.suppress(ConnectionError), started_lean():
        # What this version of Ray calls; in another one nothing may be replaced, and the start is slower.
        assert services.start_api_server(False, raise_on_failure=False) == (None, None)  # type: ignore[call-arg]
        assert Node.start_monitor(None) is None  # type: ignore[arg-type]
        assert dict(os.environ) == before[2]
        raise ConnectionError("and undone where Ray does not start")
    assert (services.start_api_server, Node.start_monitor, dict(os.environ)) == before


@pytest.mark.parametrize("value", [None, "1"])
def test_its_processes_find_the_bytecode_that_this_one_keeps(monkeypatch, value):
    for name in BYTECODE:
        monkeypatch.setenv(name, value or "")  # so that it is as before afterwards
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "pycache_prefix", "/cache/bytecode")
    with started_lean():
        assert [os.environ[name] for name in BYTECODE] == ["/cache/bytecode", ""]
    assert [os.environ.get(name) for name in BYTECODE] == [value, value]


def test_another_ray_is_started_as_it_does_itself(monkeypatch):
    monkeypatch.delattr(services, "start_api_server")
    monitor = Node.start_monitor
    with started_lean():
        assert Node.start_monitor is monitor
