"""How a Ray of this machine's own is started: lean, and with everything as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

import pytest

from zimage_runner.errors import UserError
from zimage_runner.executors import ray_start
from zimage_runner.executors.ray_start import BYTECODE, check_address, started_lean

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


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n", True),
        (b"", True),
        (b"\0\0\x06\x04\0\0\0\0\0", False),
        (None, False),
    ],
    ids=["another server", "one that hangs up", "HTTP/2", "one that is busy"],
)
def test_what_is_no_ray_is_told_at_once(monkeypatch, answer: bytes | None, refused: bool):
    monkeypatch.setattr(ray_start, "CONNECT_S", 10.0 if answer is not None else 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(100)
                caller.sendall(answer or b"")

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = pytest.raises(UserError, match=f"executor.address={address}: what answers there is no Ray: write host")
        with told if refused else contextlib.nullcontext():
            check_address(address)
