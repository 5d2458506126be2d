"""Around the start and the end of Ray: its address, its messages, its handlers of signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from zimage_runner.errors import UserError, one_line

log = logging.getLogger(__name__)

CONNECT_S = 10.0
"""Seconds that a cluster may take to answer."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a connection of HTTP/2 begins, and with it gRPC's and Ray's: these words and a frame of no settings."""
BYTECODE = ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")
"""Environment variables that tell a process of Python where bytecode is, and that it is not to be kept."""


def check_address(address: str) -> None:
    """Raise UserError unless somebody listens there and speaks as Ray does: Ray itself would ask for minutes."""
    wanted = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if not wanted:
        return  # Ray finds the cluster of this machine, or says that there is none
    host, _, port = wanted.rpartition(":")
    if "://" in wanted or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"executor.address={wanted}: write host:port as `ray start --head` prints it (usually port 6379), or auto"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as server:
            may_be_ray = _answers_in_kind(server)
    except OSError as error:
        raise UserError(
            f"executor.address={wanted}: nobody answers there ({error.strerror or error}): start a cluster with "
            "`ray start --head`, or leave the address out for a Ray of this machine's own"
        ) from None
    if not may_be_ray:
        raise UserError(
            f"executor.address={wanted}: what answers there is no Ray: write host:port as `ray start --head` prints it "
            "(usually port 6379), or auto"
        )


def _answers_in_kind(server: socket.socket) -> bool:
    """Whether settings of HTTP/2 come back; also where nothing does, or Ray encrypts: Ray itself is asked then."""
    if os.environ.get("RAY_USE_TLS"):
        return True
    server.sendall(PREFACE)
    try:
        return server.recv(9)[3:4] == b"\x04"
    except TimeoutError:
        return True


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep Ray's own messages off the terminal: this program says what they say."""
    logging.getLogger("ray").setLevel(logging.NOTSET if verbose else logging.ERROR)
    if not verbose:
        with contextlib.suppress(ImportError, AttributeError):
            from ray._private import worker

            worker.print_to_stdstream = _to_log  # deaths of processes, printed on standard output
    yield


def _to_log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    for line in data.get("lines", ()):
        log.info("ray: %s", one_line(str(line), 500))


@contextlib.contextmanager
def started_lean() -> Iterator[None]:
    """Have a Ray of this machine's own started without what nobody here uses, so that it is ready sooner.

    Ray would first start the server of its web pages and wait for it; and a monitor for adding machines, whose end it
    awaits. Python is to find bytecode where this process keeps it
    (startup/bytecode.py), or every process that Ray starts compiles Ray anew.
    """
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(ImportError, AttributeError):  # Ray's own names: another version may have others
            from ray._private import services
            from ray._private.node import Node

            _replace(undo, services, "start_api_server", lambda *_, **__: (None, None))  # as where it cannot start
            _replace(undo, Node, "start_monitor", lambda _: None)
        if sys.pycache_prefix is not None:
            for name, value in zip(BYTECODE, (sys.pycache_prefix, ""), strict=True):
                _set_variable(undo, name, value)
        yield


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, by: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, by)


def _set_variable(undo: contextlib.ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    if before is None:
        undo.callback(os.environ.pop, name)
    else:
        undo.callback(os.environ.__setitem__, name, before)
    os.environ[name] = value


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Keep this program's answers to signals, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
