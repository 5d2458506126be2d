"""Ending a run from outside: the first signal finishes what is in flight, the second exits at once.

Signals are counted by a thread of their own (through a wake-up pipe), so that the second one works even while the
main thread is inside a long call of the model's libraries.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from zimage_runner.errors import EXIT_INTERRUPTED
from zimage_runner.logs import for_stderr, writes_json

OF_A_QUEUE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGXCPU") if hasattr(signal, name))
"""Signals that a closed terminal, or a batch system before the time is up (``sbatch --signal=USR1@120``), sends. They
are requests to stop unless somebody else has a use for them: ``nohup``, or a launcher that queues the job again."""
PATIENCE = 3.0
"""Seconds. Hub clients finish the files that are under way, which may be gigabytes, before they let an exception out;
what they have of a file is kept and the next download goes on from there."""

_before_exit: list[Callable[[int], None]] = []
"""Who hears of the exit code before ``exit_at_once`` ends the process."""

POSTPONED = 0.02
"""Seconds after which a signal that arrived inside an import is looked at again."""


class StopRequest:
    """Whether the run was asked to end."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """SIGINT, SIGTERM, SIGHUP ... once one has arrived."""
        self._event = threading.Event()
        self._interruptible = False
        self._interrupted = False
        self._count = 0
        self._imports = 0
        """Imports that were under way when an interruptible phase began."""
        self._postponed = threading.Semaphore(0)
        """Counts calls that ``on_signal`` has asked for itself: no signals of the user's."""
        self.counts_itself = False
        """Whether ``on_signal`` counts, because no thread could be started for it: it waits for long calls then."""
        self._deadline: tuple[threading.Event, float] | None = None
        """Of an interruptible phase: set when it is left, and how long it may take to be left after a signal."""

    def __bool__(self) -> bool:
        return self._event.is_set()

    @property
    def is_interruptible(self) -> bool:
        """Whether a signal ends the current phase at once, or just did."""
        return self._interruptible or self._interrupted

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the request; whether there is one."""
        return self._event.wait(seconds)

    def set(self, signal_name: str) -> None:
        """Ask the run to end; the first name stays."""
        self.signal_name = self.signal_name or signal_name
        self._event.set()

    @contextlib.contextmanager
    def interruptible(self, patience: float | None = None) -> Iterator[None]:
        """For phases with nothing to lose (download, load): the first signal raises KeyboardInterrupt there.

        ``patience``: seconds after a signal at which the process exits if the phase has not been left.
        """
        if self:
            raise KeyboardInterrupt
        left = threading.Event()
        self._deadline = None if patience is None else (left, patience)
        self._imports = _imports_under_way(sys._getframe())
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
            left.set()
            self._deadline = None

    def watch_deadline(self) -> None:
        """After a signal: end the process when the present phase takes longer than it may."""
        if self._deadline is not None:
            _start(_exit_unless, *self._deadline, name="deadline")

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Python-level handler, in the main thread.

        An exception raised inside an import may be swallowed, or leave half a module behind, or abort the process: some
        of torch's modules run Python from C++. It is raised once the import is done.
        """
        if self.counts_itself:
            self.count(number)
        self.set(signal.Signals(number).name)
        if not self._interruptible:
            return
        if _imports_under_way(frame) > self._imports:
            _start(self._call_again, number, name="postponed signal")
            return
        self._interruptible, self._interrupted = False, True
        raise KeyboardInterrupt

    def count(self, number: int) -> None:
        """Say what a signal of the user's leads to; the second one ends the process."""
        if self.is_postponed():
            return
        self._count += 1
        if self._count > 1:
            _say("exiting at once; finished pictures are kept")
            os._exit(EXIT_INTERRUPTED)
        what = "stopping" if self.is_interruptible else "finishing the pictures in flight"
        self.set(signal.Signals(number).name)
        _say(f"{signal.Signals(number).name}: {what}; once more to exit at once")
        self.watch_deadline()

    def _call_again(self, number: int) -> None:
        time.sleep(POSTPONED)
        if self._interruptible:
            self._postponed.release()
            _thread.interrupt_main(signal.Signals(number))

    def is_postponed(self) -> bool:
        """Whether the signal just counted is one that ``on_signal`` repeats. Ask once for each."""
        return self._postponed.acquire(blocking=False)


def exit_at_once(code: int) -> NoReturn:
    """End the process without cleaning up; whoever waits for its exit code elsewhere is told first."""
    for tell in _before_exit:
        with contextlib.suppress(Exception):
            tell(code)
    os._exit(code)


@contextlib.contextmanager
def telling_before_exit(tell: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, ``tell`` gets the exit code of an ``exit_at_once``."""
    _before_exit.append(tell)
    try:
        yield
    finally:
        _before_exit.remove(tell)


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Install the handlers for a run and restore the old ones after it.

    Those of ``OF_A_QUEUE`` count as requests to stop where nothing else is done with them. Outside the main thread,
    where Python allows no handlers, the request is simply never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [number for number in OF_A_QUEUE if _is_free(number)]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        counter = threading.Thread(
            target=_count, args=(reader, frozenset(numbers), request), name="signals", daemon=True
        )
        counter.start()
    except (RuntimeError, MemoryError):
        request.counts_itself = True
    old_wakeup = signal.set_wakeup_fd(-1 if request.counts_itself else writer, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, request.on_signal) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        os.close(writer)  # ends the thread
        if request.counts_itself:
            os.close(reader)


def _is_free(number: signal.Signals) -> bool:
    """Whether nobody has a use for a signal; ``__main__`` answers it only until a run does."""
    handler = signal.getsignal(number)
    return handler is signal.SIG_DFL or getattr(handler, "is_for_the_start", False)


def _count(reader: int, numbers: frozenset[int], request: StopRequest) -> None:
    try:
        while received := os.read(reader, 64):
            for number in received:
                if number in numbers:
                    request.count(number)
        os.close(reader)
    except BaseException:  # for want of memory perhaps: the handler goes on counting, and closes the pipe
        request.counts_itself = True
        raise


def _start(target: Callable[..., None], *arguments: object, name: str) -> None:
    """Start a thread that sees to it that a phase with nothing to lose ends. Where none can be started it ends now."""
    try:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
    except (RuntimeError, MemoryError):
        os._exit(EXIT_INTERRUPTED)


def _imports_under_way(frame: FrameType | None) -> int:
    """How many import statements a frame is inside of."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_name == "_find_and_load"
        frame = frame.f_back
    return count


def _exit_unless(left: threading.Event, seconds: float) -> None:
    if not left.wait(seconds):
        os._exit(EXIT_INTERRUPTED)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{for_stderr(text, 'warning')}\n".encode() if writes_json() else f"\n{text}\n".encode())
