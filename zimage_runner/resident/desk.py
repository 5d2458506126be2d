"""The resident process' desk: takes requests in threads, one run at a time goes to the main thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from zimage_runner.resident.address import peer_of
from zimage_runner.resident.caller import SIGNALS, Caller
from zimage_runner.resident.likeness import differences
from zimage_runner.resident.messages import Closed, receive, receive_with_descriptors, send

FIRST_MESSAGE_S = 10.0
MOST = 64
"""Connections at a time."""


class Order:
    """One command's run: waiting, being done, or done."""

    def __init__(self, connection: socket.socket, caller: Caller) -> None:
        self.connection = connection
        self.caller = caller
        self.directory: str | None = None
        self.ended = threading.Event()
        """Nothing more will be told of it."""

    def tell(self, **message: Any) -> None:
        """Say something to the command, if it is still there."""
        with contextlib.suppress(Closed):
            send(self.connection, message)


class Desk:
    """Who is served, who waits, and whether this process leaves."""

    def __init__(
        self, listener: socket.socket, likeness: dict[str, str], describe: Callable[[], dict[str, Any]]
    ) -> None:
        """``likeness``: what a command must have in common with this process; ``describe``: for ``status``."""
        self._listener = listener
        self._likeness = likeness
        self._describe = describe
        self._changed = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._current: Order | None = None
        self._leaves: str | None = None
        """Why this process takes no more runs."""
        self._places = threading.Semaphore(MOST)
        self._main = threading.main_thread().ident

    def open(self) -> None:
        """Begin to take requests."""
        threading.Thread(target=self._accept, name="resident", daemon=True).start()

    def leave(self, why: str) -> None:
        """Take no more runs: those that wait are done, then ``next`` returns None."""
        with self._changed:
            self._leaves = self._leaves or why
            self._changed.notify_all()

    def next(self, patience_s: float) -> Order | None:
        """The next run to do, whose caller's signals arrive from now on; None when it is time to end."""
        end = time.monotonic() + patience_s
        with self._changed:
            while not self._waiting:
                left = end - time.monotonic()
                if self._leaves is not None or left <= 0:
                    self._leaves = self._leaves or "nothing was asked for so long"
                    return None
                self._changed.wait(left)
            self._current = order = self._waiting.popleft()
            listen_for(order.caller.ignored)
        order.tell(began=True)
        return order

    def done(self, order: Order, **message: Any) -> None:
        """The run has ended: no signal comes any more. Tell the command how."""
        with self._changed:
            self._current = None
            ignore_signals()
        order.caller.close()
        order.tell(**message)
        order.ended.set()

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(Closed, TimeoutError, OSError):
                self._answer(connection)
        finally:
            self._places.release()

    def _answer(self, connection: socket.socket) -> None:
        if peer_of(connection)[1] != os.geteuid():
            return
        connection.settimeout(FIRST_MESSAGE_S)
        message, descriptors = receive_with_descriptors(connection)
        connection.settimeout(None)
        if message.get("do") == "run":
            self._take(connection, message, descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if message.get("do") in ("stop", "status"):
            with self._changed:
                current = self._current
                state = {
                    "pid": os.getpid(),
                    "run": current and (current.directory or "being composed"),
                    "waiting": len(self._waiting),
                    "leaves": self._leaves,
                }
            send(connection, {"status": state | self._describe()})
        if message.get("do") == "stop":
            self.leave("it was told to stop")  # after the answer: the process may end at once
            self._wait_for_end(connection)

    def _take(self, connection: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
        caller = Caller.of(message, descriptors)
        likeness = message.get("likeness")
        other = differences(self._likeness, likeness) if isinstance(likeness, dict) else ["everything"]
        order = Order(connection, caller)
        with self._changed:
            leaves = self._leaves or ("another version or other settings were asked for" if other else None)
            busy = self._current is not None or bool(self._waiting)
            if leaves is None:
                if busy:
                    order.tell(waits=True)
                self._waiting.append(order)
                self._changed.notify_all()
        if leaves is not None:
            caller.close()
            order.tell(leaves=leaves, differences=other)
            self.leave(leaves)  # after the answer: the process may end at once
            self._wait_for_end(connection)
            return
        self._listen(order)

    def _listen(self, order: Order) -> None:
        """Pass the caller's signals on; its end is one."""
        while not order.ended.is_set():
            try:
                message = receive(order.connection)
            except Closed:
                self._signal(order, signal.SIGTERM)
                order.ended.wait()
                return
            if message.get("signal") in SIGNALS:
                self._signal(order, signal.Signals(message["signal"]))

    def _signal(self, order: Order, number: signal.Signals) -> None:
        with self._changed:
            if order is self._current and self._main is not None:
                signal.pthread_kill(self._main, number)
            elif order in self._waiting:
                self._waiting.remove(order)
                order.caller.close()
                order.tell(dropped=True)
                order.ended.set()

    def _wait_for_end(self, connection: socket.socket) -> None:
        """Keep a connection open until the process ends: that is how the other side learns of it."""
        with contextlib.suppress(Closed):
            while True:
                receive(connection)


def ignore_signals() -> None:
    """Between runs: nothing but the socket ends this process in an orderly way."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)


def listen_for(ignored: list[int]) -> None:
    """Until the run listens itself, answer as every start of the program does."""
    from zimage_runner.__main__ import listen

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    listen()
