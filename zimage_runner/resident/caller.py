"""Be the caller while its run is done: its standard streams, its folder, its environment, its signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType
from typing import Any

from zimage_runner.resident.messages import Closed, close_all
from zimage_runner.signals import OF_A_QUEUE

SIGNALS = (signal.SIGINT, signal.SIGTERM, *OF_A_QUEUE)
"""What the command's process passes on."""
STREAMS = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """What one command line brings with it."""

    words: list[str]
    program: str
    """Its ``sys.argv[0]``."""
    environment: dict[str, str]
    umask: int
    module_folder: str | None
    """Its ``sys.path[0]``; None where Python was told to leave that out."""
    ignored: list[int]
    """Signals that it ignores, as ``nohup`` has it."""
    streams: list[tuple[str, str]]
    """Encoding and error handler of input, output and error."""
    started: float | None
    """When its process was started, in seconds since the machine was."""
    repeats: bool
    """Whether the command has composed this once already: what composing says was said then."""
    descriptors: list[int]
    """Input, output, error and the folder that it was given in; closed by ``close``."""

    @classmethod
    def of(cls, message: dict[str, Any], descriptors: list[int]) -> Caller:
        """Raises Closed for a message that is not as client.py makes it."""
        try:
            caller = cls(
                words=[str(word) for word in message["words"]],
                program=str(message["program"]),
                environment={str(name): str(value) for name, value in message["environment"].items()},
                umask=int(message["umask"]) & 0o777,
                module_folder=None if message["module_folder"] is None else str(message["module_folder"]),
                ignored=[number for number in message["ignored"] if number in SIGNALS],
                streams=[(str(encoding), str(errors)) for encoding, errors in message["streams"]],
                started=None if message["started"] is None else float(message["started"]),
                repeats=bool(message["repeats"]),
                descriptors=descriptors,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Closed(f"not a run: {error}") from None
        if len(caller.streams) != STREAMS or len(descriptors) != STREAMS + 1:
            raise Closed("a run comes with three streams and a folder")
        return caller

    def close(self) -> None:
        """Close its descriptors."""
        close_all(self.descriptors)
        self.descriptors.clear()


@contextlib.contextmanager
def being(caller: Caller) -> Iterator[None]:
    """Have all that belongs to the caller, in the main thread, while the block runs. Signals are the desk's affair.

    The objects ``sys.stdout`` and ``sys.stderr`` stay: libraries hold on to them. What they lead to changes.
    """
    argv, path, environment = sys.argv, list(sys.path), dict(os.environ)
    before = set(sys.modules)
    umask = os.umask(caller.umask)
    try:
        _connect(caller)
        os.fchdir(caller.descriptors[STREAMS])
        _set_environment(caller.environment)
        sys.argv = [caller.program]
        if caller.module_folder is not None:
            sys.path[:] = [caller.module_folder, *path]
        warnings.filterwarnings("default", category=_Never)  # what was warned of once is warned of again
        yield
    finally:
        _disconnect()
        sys.argv, sys.path[:] = argv, path
        _set_environment(environment)
        os.umask(umask)
        os.chdir("/")
        _forget_modules(caller.module_folder, before)


class _Never(Warning):
    """Nobody warns with this."""


def _connect(caller: Caller) -> None:
    for number in range(STREAMS):
        os.dup2(caller.descriptors[number], number)
    (encoding, errors), *outputs = caller.streams
    with contextlib.suppress(LookupError):
        sys.stdin = open(0, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115 - until the run has ended
    for stream, (encoding, errors) in zip((sys.stdout, sys.stderr), outputs, strict=True):
        assert isinstance(stream, io.TextIOWrapper)
        with contextlib.suppress(LookupError):
            stream.reconfigure(
                encoding=encoding, errors=errors, line_buffering=stream is sys.stderr or os.isatty(stream.fileno())
            )


def _disconnect() -> None:
    """Nothing of the caller's stays open: whoever reads its output waits for the end of it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    for number in range(STREAMS):
        os.dup2(nowhere, number)
    os.close(nowhere)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process


def _set_environment(wanted: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in wanted]:
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    time.tzset()


def _forget_modules(folder: str | None, before: set[str]) -> None:
    """Modules found in the folder that the command was given in: the next command may find others under these names.

    What only lies somewhere below it stays (a virtual environment, say), and so does a package with compiled modules:
    imported once more they break the process.
    """
    if not folder or folder in sys.path:
        return
    new = {name: module for name in set(sys.modules) - before if (module := sys.modules.get(name)) is not None}
    compiled = {
        name.partition(".")[0] for name, module in new.items() if _origin(module).endswith(tuple(EXTENSION_SUFFIXES))
    }
    for name in new:
        top = name.partition(".")[0]
        found = top in new and _place(new[top]) == folder
        if found and top not in compiled and top != "zimage_runner":
            del sys.modules[name]


def _origin(module: ModuleType) -> str:
    return getattr(getattr(module, "__spec__", None), "origin", None) or ""


def _place(module: ModuleType) -> str:
    """The folder in which a module or package was found."""
    parts = list(getattr(module, "__path__", ())) or [_origin(module)]
    return os.path.dirname(parts[0])
