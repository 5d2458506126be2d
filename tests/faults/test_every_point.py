"""Memory, threads and descriptors that the system refuses at any point of a run's life.

A run of two pictures is traced in all its threads. At a line of the package, whichever it is,
MemoryError is raised, as the system would. Whatever that does, the run ends with an exit code and no traceback of
its own, does not hang, keeps each picture that its ledger has, and the next start draws what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import linecache
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import pytest

import zimage_runner
from tests.support.fault_runs import Run, check_item
from tests.support.faulty_session import FaultySession
from zimage_runner import __main__ as program
from zimage_runner.cli.main import main
from zimage_runner.config.schema import Composed
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.prompts.inline import Inline
from zimage_runner.runner import pool
from zimage_runner.runner.execute import execute

PACKAGE = str(Path(zimage_runner.__file__).parent)
PATIENCE = 60.0
"""Seconds after which a run counts as hanging, on the busiest machine."""
SECONDS = float(os.environ.get("EVERY_POINT_SECONDS", "3000"))
"""For the long form, which takes the points in an order of chance."""
SHORT = 8
"""Points of the short form, spread over a run's life."""


Point = tuple[str, int]
"""A line of the package, and how many times it has been reached before."""


class Trace:
    """Counts how often threads reach each line of the package, and raises at one of them."""

    def __init__(self, fails_at: Point | None = None) -> None:
        self.fails_at = fails_at
        self.reached: Counter[str] = Counter()
        self._inside: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Trace:
        threading.settrace(self.called)
        sys.settrace(self.called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _leaves(self, frame: FrameType) -> bool:
        """Whether a ``with`` block is left: its line comes again then, and a lock would stay held."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        place = id(frame), frame.f_lineno
        is_left = place in self._inside
        (self._inside.discard if is_left else self._inside.add)(place)
        return is_left

    def points(self) -> list[Point]:
        """Each line that was reached, for the first and for the last time."""
        with self._lock:
            return list(dict.fromkeys((where, n) for where, times in self.reached.items() for n in (0, times - 1)))

    def called(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        return self.line if name.startswith(PACKAGE) and not name.endswith("__main__.py") else None

    def line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        # Nothing can be refused by the word ``try``: it stands for no instruction.
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:":
            where = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
            if self._leaves(frame):
                return self.line
            with self._lock:
                point = where, self.reached[where]
                self.reached[where] += 1
            if point == self.fails_at:
                os.write(2, f"refused at {where}\n".encode())
                raise MemoryError
        return self.line


class Life:
    """A run of two pictures, from its composed config to its end, again and again in new directories."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "Session", FaultySession)
        monkeypatch.setenv("FAULTS", "[]")
        self.run = Run(folder, seeds=1)
        composed: list[Composed] = []
        assert main(self.run.argv(), take=lambda job: composed.append(job) or 0) == 0
        self.composed = composed[0]
        self._numbers = itertools.count()

    def begin(self) -> None:
        """Leave what was drawn before: the next run has a directory of its own."""
        self.run.run_dir = self.run.folder / str(next(self._numbers))
        self.run.run_dir.mkdir()

    def go_on(self) -> int:
        """Begin the run or continue it."""
        directory, config = self.run.run_dir, self.composed.config
        if self.run.started:
            config = dataclasses.replace(config, resume=str(directory))
        directory.mkdir(exist_ok=True)
        code = execute(dataclasses.replace(self.composed, config=config, directory=directory))
        assert isinstance(code, int)
        return code

    def in_a_process(self, fault: contextlib.AbstractContextManager[Any]) -> tuple[int, str]:
        """As ``go_on`` with a fault, in a process of its own: exit code and what it said. Fails if it hangs."""
        log = self.run.folder / "err"
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            code = 99
            try:
                fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(fd, 2)
                os.dup2(fd, 1)
                sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__
                with fault:
                    code = program.whatever_happens([])
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    cast(TextIO, sys.stderr).flush()
                os._exit(code)
        end = time.monotonic() + PATIENCE
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"it hangs: {fault}\n{log.read_text()}")
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(ended[1]), log.read_text()

    def check(self, code: int, err: str, where: str) -> None:
        """What has to hold after any fault, and that the next start draws what is left."""
        assert code in (0, 1, 2, 130), where
        said = [line for line in err.splitlines() if line.strip() and not line.startswith("refused at")]
        where = f"{where}: {code}\n{err}"
        kept = Ledger.load(self.run.run_dir / RECORDS).entries if self.run.run_dir.is_dir() else {}
        items = self.run.items()
        if code == 0:
            assert kept.keys() == items.keys(), where
        done = {name: entry for name, entry in kept.items() if entry.ok}
        for name, entry in done.items():
            check_item(self.run.run_dir, name, entry, *items[name])
        if code:
            assert said, where
        assert self.go_on() == 0, where
        self.run.check()
        now = Ledger.load(self.run.run_dir / RECORDS).entries
        assert all(now[name] == entry for name, entry in done.items()), where


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    monkeypatch.chdir(tmp_path)
    life = Life(tmp_path, monkeypatch)
    monkeypatch.setattr(program, "_run", lambda argv: life.go_on())
    return life


def fail_everywhere(life: Life, count: int | None) -> tuple[int, int]:
    """Fail at every line the first and the last time that it is reached, or at ``count`` of these points.

    Points that were tried, and runs that ended otherwise than with 0 for it.
    """
    life.begin()
    with Trace() as trace:
        assert life.go_on() == 0
    points = trace.points()
    assert len(points) > 500
    points = points if count is None else points[:: len(points) // count]
    random.Random(0).shuffle(points)
    os.write(2, f"{len(points)} points\n".encode())
    ended, end = 0, time.monotonic() + SECONDS
    for tried, point in enumerate(points):
        if time.monotonic() > end:
            return tried, ended
        life.begin()
        code, err = life.in_a_process(Trace(point))
        ended += code != 0
        life.check(code, err, str(point))
    return len(points), ended


@pytest.mark.timeout(300)
def test_memory_is_refused_here_and_there(life):
    reached, ended = fail_everywhere(life, SHORT)
    assert reached >= SHORT
    assert ended >= SHORT // 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_is_refused_at_every_line(life, capfd):
    reached, ended = fail_everywhere(life, None)
    with capfd.disabled():
        print(f"{reached} points, {ended} runs ended for it, within {SECONDS:g} s")
    assert reached >= 50


class Refusal:
    """Lets some calls of a function fail: those with the numbers for which ``fails`` is true."""

    def __init__(self, owner: Any, name: str, error: BaseException, fails: Callable[[int], bool]) -> None:
        self.owner, self.name, self.error, self.fails = owner, name, error, fails
        self.real = getattr(owner, name)
        self.numbers = itertools.count()

    def __enter__(self) -> Refusal:
        setattr(self.owner, self.name, self.call)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.real)

    def call(self, *args: Any, **options: Any) -> Any:
        ours = not isinstance(args[0], int) or args[0] > 2  # the terminal is another matter
        if ours and self.fails(number := next(self.numbers)):
            self.real_write(2, f"refused at call {number} of {self.name}\n".encode())
            raise self.error
        return self.real(*args, **options)

    real_write = staticmethod(os.write)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("only_one", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_threads_are_refused_one_after_the_other(life, only_one):
    """The n-th thread, or no thread from the n-th on: for every n."""
    error = RuntimeError("can't start new thread")
    for refused in range(100):
        life.begin()
        # A thread's ``start`` is looked up on its class, and gets the thread.
        refusal = Refusal(threading.Thread, "start", error, lambda n: n == refused if only_one else n >= refused)  # noqa: B023
        refusal.__dict__["call"] = bound(refusal)
        code, err = life.in_a_process(refusal)
        life.check(code, err, f"thread {refused}")
        if "refused at" not in err:
            break
    assert 3 <= refused < 100


def bound(refusal: Refusal) -> Callable[..., Any]:
    """A function, which a class binds to its objects."""

    def start(thread: threading.Thread) -> Any:
        return Refusal.call(refusal, thread)

    return start


CALLS = ("open", "write", "fsync", "rename", "mkdir", "dup")
REASONS = (errno.ENOMEM, errno.EMFILE, errno.EIO, errno.ENOSPC)


def refuse_calls(life: Life, name: str, reason: int, numbers: Sequence[int]) -> int:
    tried = 0
    for refused in numbers:
        life.begin()
        refusal = Refusal(os, name, OSError(reason, os.strerror(reason)), lambda n: n == refused)  # noqa: B023
        code, err = life.in_a_process(refusal)
        life.check(code, err, f"{name} {refused}")
        tried += 1
        if "refused at" not in err:
            break
    return tried


@pytest.mark.timeout(300)
def test_a_few_calls_of_the_system_fail(life):
    for name, reason in zip(CALLS, itertools.cycle(REASONS)):
        assert refuse_calls(life, name, reason, [2]) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reason", REASONS, ids=errno.errorcode.get)
def test_every_call_of_the_system_fails(life, name, reason):
    tried = refuse_calls(life, name, reason, range(10_000))
    print(f"{name}: {tried} calls")
    assert 5 <= tried < 10_000


class Killed:
    """The process dies, as if killed, before or after the ledger has its line."""

    def __init__(self, after: bool) -> None:
        self.after = after

    def __enter__(self) -> Killed:
        real = Ledger.append

        def append(*args: Any, **options: Any) -> None:
            if self.after:
                real(*args, **options)
            os._exit(137)

        Ledger.append = append
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("after", [False, True])
def test_a_saved_output_file_is_there_whenever_it_is_killed(life, tmp_path, after):
    """It was lost where the process was killed after the ledger's line: 40 of 40 times."""
    target = tmp_path / "here.png"
    prompt = {"prompt": "a cat", "prompts": Inline(), "seeds": [1], "output_file": str(target)}
    life.composed = dataclasses.replace(
        life.composed, config=dataclasses.replace(life.composed.config, **prompt), files={}
    )
    life.begin()
    code, _ = life.in_a_process(Killed(after))
    assert code == 137
    assert (life.run.run_dir / RECORDS).stat().st_size > 0 if after else True
    if not after:
        target.unlink(missing_ok=True)
    assert target.exists() == after
    life.composed = dataclasses.replace(
        life.composed, config=dataclasses.replace(life.composed.config, resume=str(life.run.run_dir))
    )
    assert life.go_on() == 0
    assert target.read_bytes() == (life.run.run_dir / "items/00000_a_cat/seed_1/image.png").read_bytes()
