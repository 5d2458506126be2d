"""What the command line does with ``executor=resident``: find the process, hand the run over, wait for its exit code.

It imports next to nothing: no Hydra, no torch, and what is only needed where something is to be said comes then. What
the run prints goes from the resident process straight to this one's streams.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time

from zimage_runner.errors import EXIT_INTERRUPTED, UserError
from zimage_runner.outputs.since import started
from zimage_runner.resident.address import Folder, folder, name_here
from zimage_runner.resident.likeness import of_this_process
from zimage_runner.resident.messages import Closed, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes as long as all the rest
    from collections.abc import Sequence
    from types import FrameType
    from typing import Any

LEDGER = "records.jsonl"
SETTINGS = ".hydra/overrides.yaml"
"""Written before the first picture; a directory that has it can be resumed."""
MOST_STARTS = 20
"""Processes asked one after the other before giving up: each may leave just as it is asked."""
START_SECONDS = 60.0
LAST_PATIENCE = 3.0
"""Seconds after a second signal."""
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")


def hand_over(words: Sequence[str], *, repeats: bool = False) -> int:
    """Have a run done by the resident process. Return its exit code.

    ``repeats``: the words were composed here already, so what composing says was said.
    """
    try:
        with folder() as here:
            return Client(here, list(words), repeats=repeats).run()
    except UserError as error:
        from zimage_runner.logs import refuse

        return refuse(str(error))


class Client:
    """One command line, until its exit code is known."""

    def __init__(self, here: Folder, words: list[str], *, repeats: bool) -> None:
        self._folder = here
        self._name = name_here()
        self._words = words
        self._repeats = repeats
        self._likeness = of_this_process()
        self._connection: socket.socket | None = None
        self._signals = 0
        self._directory: str | None = None
        self._lost = 0
        """Processes that died before the run's first file."""
        self._drawn = -1
        """Size of the run's ledger when the process was lost last."""
        self._told: set[str] = set()

    def run(self) -> int:
        """The exit code. Raises UserError."""
        with _forwarding(self._on_signal):
            for _ in range(MOST_STARTS):
                connection = self._connect()
                try:
                    code = self._ask(connection)
                finally:
                    self._connection = None
                    connection.close()
                if code is not None:
                    return code
        raise UserError("executor=resident: no resident process takes this run: use executor=inline")

    def _connect(self) -> socket.socket:
        """A connection to the process, which is started where there is none."""
        end = time.monotonic() + START_SECONDS
        while (connection := self._folder.connect(self._name)) is None:
            if time.monotonic() > end:
                raise UserError("executor=resident: the process does not answer: use executor=inline")
            from zimage_runner.resident.spawn import spawn

            if not spawn(self._name, self._likeness):
                time.sleep(0.02)  # another one is starting, or just leaving
        return connection

    def _ask(self, connection: socket.socket) -> int | None:
        """Have this process do the run. The exit code; None: ask the next process."""
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            send(connection, self._request(), (0, 1, 2, here))
        except Closed:
            return None
        except ValueError as error:
            raise UserError(f"executor=resident: {error}: use executor=inline") from None
        finally:
            os.close(here)
        self._connection = connection
        begun = False
        try:
            while True:
                message = receive(connection)
                if "exit" in message:
                    return int(message["exit"])
                if "dropped" in message:
                    return self._stopped()
                if "leaves" in message:
                    self._tell_leaving(message)
                    _wait_for_end(connection)
                    return self._stopped() if self._signals else None
                begun = begun or "began" in message
                self._directory = message.get("directory", self._directory)
                if "waits" in message:
                    self._say("executor=resident: waiting for the end of another command's run")
        except (Closed, TimeoutError):
            if self._signals:  # the second one ends the process at once, the first does while it composes
                return EXIT_INTERRUPTED
            return self._go_on() if begun else None

    def _request(self) -> dict[str, Any]:
        umask = os.umask(0o077)
        os.umask(umask)
        return {
            "do": "run",
            "likeness": self._likeness,
            "words": self._words,
            "program": sys.argv[0],
            "environment": dict(os.environ),
            "umask": umask,
            "module_folder": None if sys.flags.safe_path else sys.path[0],
            "ignored": [
                number
                for name in FORWARDED
                if hasattr(signal, name) and signal.getsignal(number := getattr(signal, name)) is signal.SIG_IGN
            ],
            "streams": [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)],
            "started": started(),
            "repeats": self._repeats,
        }

    def _go_on(self) -> int | None:
        """The process died within the run. None: another one shall go on with it. Raises UserError."""
        directory = self._directory
        if directory is None or not os.path.exists(os.path.join(directory, SETTINGS)):
            self._lost += 1
            if self._lost > 1:
                raise UserError("executor=resident: the process died twice before it drew: use executor=inline")
            self._say("executor=resident: the process died; another one begins again", "warning")
            return None
        drawn = _size(os.path.join(directory, LEDGER))
        resume = f"resume={directory}"
        if drawn == self._drawn:
            self._say(
                f"executor=resident: the process died twice without a picture in between: {resume} executor=process "
                "goes on, and gives up what cannot be drawn",
                "error",
            )
            return EXIT_INTERRUPTED
        self._drawn = drawn
        if any(word in ("-m", "--multirun") for word in self._words):
            self._say(f"executor=resident: the process died; to go on: {resume.rpartition('/')[0]}", "error")
            return EXIT_INTERRUPTED
        self._say("executor=resident: the process died; another one goes on with the run", "warning")
        self._words = [resume]
        return None

    def _tell_leaving(self, message: dict[str, Any]) -> None:
        other = ", ".join(message["differences"][:3])
        why = f"it differs in {other}" if other else message["leaves"]
        self._say(f"executor=resident: the process at hand leaves ({why}); another one is started")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        self._signal = number
        if self._connection is None:
            os._exit(self._stopped())
        try:
            send(self._connection, {"signal": number})
        except Closed:
            return  # the main thread will see it
        if self._signals > 1:
            self._connection.settimeout(LAST_PATIENCE)

    def _stopped(self) -> int:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"zimage_runner: stopped by {signal.Signals(self._signal).name}\n".encode())
        return EXIT_INTERRUPTED

    def _say(self, text: str, level: str = "info") -> None:
        from zimage_runner.logs import LogFormat, say, use_format, writes_json

        if [word for word in self._words if word.startswith("log.format=")][-1:] == ["log.format=json"]:
            use_format(LogFormat.json)
        if text not in self._told:
            self._told.add(text)
            say(text if writes_json() else f"zimage_runner: {text}", level=level)


@contextlib.contextmanager
def _forwarding(handler: Any):
    """Pass on what arrives, but for what is ignored."""
    before = {}
    for name in FORWARDED:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _wait_for_end(connection: socket.socket) -> None:
    with contextlib.suppress(Closed, TimeoutError):
        while True:
            receive(connection)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
