"""A worker process as its parent sees it: start, send, receive with a time limit, end."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.executors.messages import Broken, Drawn, LogLine, Ready, Refused, Start

_BOOT = (
    "import json, sys; fd, parent, sys.path[:] = json.loads(sys.argv[1]); "
    "from zimage_runner.startup.process import begin; begin(warns=False); "
    "from zimage_runner.executors.worker import main; main(fd, parent)"
)
"""What a worker process executes: a process entry, like ``__main__``."""
"""Run with -P: what the current folder holds (a json.py) is not imported before the parent's own path is set."""
CLOSE_SECONDS = 5.0


class WorkerDied(Exception):
    """The worker is gone (and its process reaped). The text says how."""


class WorkerBroken(WorkerDied):
    """The worker reported an error that it cannot go on after, and ended."""


class WorkerHung(WorkerDied):
    """The worker gave no sign of life and was killed."""


class Child:
    """One worker process, from spawn to ``ready``, then messages until it ends."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with contextlib.closing(theirs):
            arguments = json.dumps([theirs.fileno(), os.getpid(), sys.path])
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-X", "faulthandler", "-c", _BOOT, arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # a terminal's Ctrl-C is for the parent; the group is what gets killed
                )
            except BaseException:
                self._connection.close()
                raise
        self._pidfd = -1
        with contextlib.suppress(OSError):  # refused by some sandboxes; the closing socket tells of the end as well
            self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone; ``receive`` then tells how, after what it said before."""
        return self._process.poll() is not None

    def start(self, start: Start, timeout_s: float) -> dict[str, Any]:
        """Have it load its session; the session's report. Raises as ``receive``."""
        self.send(start)
        return self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """The report of a session that was told to start or to extend. Raises as ``receive``."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive(max(0.0, deadline - time.monotonic()), timeout_s)
            if isinstance(message, Ready):
                return message.report

    def send(self, message: Any) -> None:
        """Send it. That a worker has ended is told by ``receive``, after all that the worker said before."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def receive(self, timeout_s: float, limit_s: float) -> Any:
        """The next message; Drawn comes with its pixels, as a pair.

        Raises WorkerDied, WorkerHung after the timeout, and UserError if no other worker would do better. ``limit_s``
        is the limit to name in the message: the timeout may be what is left of it.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            watched = [self._connection, *([self._pidfd] if self._pidfd >= 0 else [])]
            ready = wait(watched, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise WorkerHung(f"gave no sign of life for {limit_s:g} s and was killed")
            if self._connection not in ready and not self._connection.poll():
                raise self._died()
            try:
                message = self._connection.recv()
                if isinstance(message, Drawn):
                    import numpy as np  # not at the top: --cfg job and a config's error need no numpy

                    pixels = np.frombuffer(self._connection.recv_bytes(), dtype=np.uint8)
                    return message, pixels.reshape(message.shape)
            except (EOFError, OSError):
                raise self._died() from None
            if isinstance(message, LogLine):
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            elif isinstance(message, Broken | Refused):
                raise self._said(message)
            else:
                return message

    def close(self) -> None:
        """Let it end by closing the connection; kill it if it does not."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> int:
        """End it and its own children now; its exit code. Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._connection.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return code

    def _said(self, why: Broken | Refused) -> WorkerBroken | UserError:
        self.kill()
        return UserError(why.message) if isinstance(why, Refused) else WorkerBroken(f"ended: {why.message}")

    def _died(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)  # its own exit code, not that of our kill
        code = self.kill()
        if code == -signal.SIGKILL:
            return WorkerDied("was killed (SIGKILL): by hand, or by the system for want of memory")
        if code < 0:
            return WorkerDied(f"was killed by {signal.Signals(-code).name}")
        return WorkerDied(f"ended with exit code {code}")
