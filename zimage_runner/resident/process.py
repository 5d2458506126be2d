"""The resident process: the first command starts it, and it ends after ``executor.idle_minutes`` without a run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from zimage_runner.errors import EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, UserError
from zimage_runner.executors.handing import become_resident
from zimage_runner.executors.resident import IDLE_MINUTES, ResidentExecutorConfig
from zimage_runner.resident.address import Folder
from zimage_runner.resident.caller import STREAMS, being
from zimage_runner.resident.desk import Desk, Order, ignore_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from zimage_runner.config.schema import Composed
    from zimage_runner.runner.pool import Kept

OUT_OF_MEMORY = b"zimage_runner: out of memory: what is finished is kept; end other programs, then resume\n"
EXIT_TAKEN = 3
"""Another resident process has the address."""


class AnotherProcess(BaseException):
    """This run needs a process in which something was not yet set. Not an Exception: Hydra reports those itself."""


def main() -> int:
    """Listen, let go of whoever started this, and do runs until it is time to end. Return the exit code.

    Standard input holds an object of JSON: ``name`` of the socket, and the starter's ``likeness``.
    """
    told = json.loads(sys.stdin.buffer.read())
    try:
        folder = Folder()
        lock = folder.lock(told["name"])
        if lock is None:
            return EXIT_TAKEN
        listener = folder.listen(told["name"])
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_ITEMS_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os._exit(0)  # whoever started this sees that it listens
    _let_go()
    ignore_signals()
    become_resident()
    keeper = _Keeper()
    desk = Desk(listener, told["likeness"], keeper.describe)
    desk.open()
    keeper.work(desk)
    # The name goes first: who comes now starts another process, which waits for the lock.
    os.unlink(told["name"], dir_fd=folder.fd)
    listener.close()
    keeper.close()
    os._exit(0)  # threads that still speak to somebody end with the process, and so does the lock


def _let_go() -> None:
    """Keep nothing of the starter's but the environment."""
    os.chdir("/")
    # Streams that take their end for a pipe's: they never ask for a position, which a caller's terminal has not.
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.close(reader)
    os.close(writer)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(STREAMS):
        os.dup2(nowhere, number)
    os.close(nowhere)


class _Keeper:
    """Does the runs, and keeps the model between them."""

    def __init__(self) -> None:
        self.idle_s = IDLE_MINUTES * 60
        self._since = time.time()
        self._runs = 0
        self._kept: Kept | None = None
        self._once: str | None = None
        """Settings of the first run that a process can have only once."""
        self._imports: Any = None

    def describe(self) -> dict[str, Any]:
        """For ``status``."""
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return {
            "model": self._kept.name if self._kept is not None else None,
            "runs": self._runs,
            "since": self._since,
            "idle_minutes": self.idle_s / 60,
            "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        }

    def work(self, desk: Desk) -> None:
        """Do runs until the desk says that it is time to end."""
        self._prepare()
        while (order := desk.next(self.idle_s)) is not None:
            self._runs += 1
            message = self._do(order, desk)
            desk.done(order, **message)
            gc.collect()
            gc.freeze()  # what is here now stays; looking through it takes as long as a small picture

    def close(self) -> None:
        """Give the model's memory back."""
        if self._kept is not None:
            self._kept.close()

    def _prepare(self) -> None:
        from zimage_runner.startup.fork import pays_here

        if pays_here():
            from zimage_runner.startup.imports import Imports

            self._imports = Imports()
        from zimage_runner.cli.hydra_patches import keep_what_was_composed
        from zimage_runner.runner.pool import keep_between_runs

        keep_what_was_composed()
        self._kept = keep_between_runs()

    def _do(self, order: Order, desk: Desk) -> dict[str, Any]:
        assert self._kept is not None
        try:
            with being(order.caller):
                code = self._run(order)
        except AnotherProcess as why:
            desk.leave(str(why))
            return {"leaves": str(why), "differences": []}
        except OSError as error:  # the caller's folder or streams
            desk.leave(str(error))
            return {"leaves": str(error), "differences": []}
        if self._kept.is_lost:
            desk.leave("something went wrong in it")
        return {"exit": code}

    def _run(self, order: Order) -> int:
        """Do a run, whatever comes of it. Return its exit code."""
        from zimage_runner.signals import telling_before_exit

        assert self._kept is not None
        with telling_before_exit(lambda code: order.tell(exit=code)):
            try:
                return self._draw(order)
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except MemoryError:
                self._kept.lose()
                os.write(2, OUT_OF_MEMORY)
                return EXIT_INTERRUPTED
            except AnotherProcess:
                raise
            except BaseException as error:
                self._kept.lose()
                traceback.print_exception(error)
                return EXIT_ITEMS_FAILED

    def _draw(self, order: Order) -> int:
        from zimage_runner import logs
        from zimage_runner.cli.main import main as run
        from zimage_runner.memory.readings import forget_peaks
        from zimage_runner.outputs.since import count_from
        from zimage_runner.runner.execute import execute

        forget_peaks()
        count_from(order.caller.started)
        quiet = logs.quiet.set(True) if order.caller.repeats else None

        def take(composed: Composed) -> Any:
            nonlocal quiet
            if quiet is not None:
                logs.quiet.reset(quiet)
                quiet = None
            self._suit(composed)
            order.directory = str(composed.directory)
            order.tell(directory=order.directory)
            return execute(composed)

        try:
            return run(order.caller.words, take)
        finally:
            if quiet is not None:
                logs.quiet.reset(quiet)

    def _suit(self, composed: Composed) -> None:
        """Take over what a config says of this process. Raises AnotherProcess where this one cannot any more."""
        config = composed.config
        if self._imports is not None:
            self._imports.suit(config)
            self._imports = None
        if isinstance(config.executor, ResidentExecutorConfig):
            self.idle_s = config.executor.idle_minutes * 60
        if config.dry_run:
            return
        memory, compile = config.memory, config.compile
        once = f"{memory.alloc_conf} {memory.alloc} {getattr(compile, 'cache_dir', None)}"
        if self._once is None:
            self._once = once
        elif once != self._once:
            composed.remove_unused_directory()
            raise AnotherProcess("memory.alloc or compile.cache_dir is another, which torch reads only once")


def start() -> NoReturn:
    """What a new process executes (client.py)."""
    code = EXIT_ITEMS_FAILED
    with contextlib.suppress(KeyboardInterrupt):
        code = main()
    sys.stderr.flush()
    os._exit(code)
