"""``import torch`` and the CUDA context begin with the process, while a forked child composes the config.

Composing (Hydra, OmegaConf, the grammar) takes a third of a second, importing torch a second, and in one process they
come one after the other: both hold the interpreter's lock. So the process forks before anything else. The child goes
through the command line as ever (cli/) and sends the composed job through a pipe; a command line that ends without
one (a typo, a refusal) ends both with the child's code and the child's words. Meanwhile a thread of the parent imports
the runner and torch, and another creates the CUDA context.

Only where torch and the GPU are likely wanted (``pays``). All else goes through cli.py in one process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

from zimage_runner.executors.handing import wants_plan
from zimage_runner.startup.imports import Imports, sees_gpu

TYPE_CHECKING = False
if TYPE_CHECKING:  # nothing is imported before the fork that can come after it
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

    from zimage_runner.config.schema import Composed, RunConfig

TAKEN = b"taken"
"""What the parent answers when it has the job, and with it the run directory."""
LENGTH_BYTES = 8
PATIENCE = 2.0
"""Seconds that a child has to remove its run directory when a signal ends the process."""
KILLED = 128

_child: Child | None = None
_composed: Composed | None = None
_imports: Imports | None = None


def pays(argv: Sequence[str]) -> bool:
    """Whether to fork: torch and a GPU are likely wanted, and there is a CPU to spare."""
    if not sys.platform.startswith("linux") or threading.active_count() > 1 or not all(map(_is_plain, argv)):
        return False
    return pays_here()


def pays_here() -> bool:
    """Whether this machine has a GPU to get ready and a second CPU to do it. Tests put True in its place."""
    return sees_gpu() and len(os.sched_getaffinity(0)) > 1


def _is_plain(word: str) -> bool:
    """Whether a word of the command line leaves a single run of the native engine possible.

    Options and Hydra's own settings may do anything; torch has to know its allocator's backend when it is imported.
    """
    if word.startswith("-"):
        return False
    key, _, value = word.partition("=")
    key, value = key.lstrip("+~"), value.strip("\"'")
    if key == "resume" or "hydra" in key or "alloc" in key:
        return False
    return not (
        (key == "dry_run" and wants_plan(value))
        or (key == "executor" and value != "inline")
        or (key == "engine" and value != "native")
        or (key == "engine.device" and value == "cpu")
    )


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code, as cli.main does."""
    global _child, _composed, _imports
    _child = Child(argv)
    _imports = Imports()
    message = _child.receive()
    if message is None:
        return _child.end()
    import pickle

    from zimage_runner.errors import EXIT_INTERRUPTED
    from zimage_runner.executors.handing import HandOver, belongs_elsewhere
    from zimage_runner.logs import log_to_terminal, refuse
    from zimage_runner.runner.execute import execute
    from zimage_runner.startup.process import PLAIN_START

    _composed = composed = pickle.loads(message)
    _child.let_go()
    log_to_terminal()
    try:
        if needs_backend_early(composed.config):
            composed.remove_unused_directory()
            return refuse(
                "memory.alloc.backend=cudaMallocAsync has to be known when torch is imported: give it on the command "
                f"line, or set {PLAIN_START}=1 in the environment"
            )
        _imports.suit(composed.config)
        if belongs_elsewhere(composed.config.executor, dry_run=composed.config.dry_run):
            composed.remove_unused_directory()
            raise HandOver
        code = execute(composed)
        assert isinstance(code, int), "only a multirun's jobs end later"
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def needs_backend_early(config: RunConfig) -> bool:
    """Whether the allocator's backend, which torch reads while it is imported, is not its default."""
    text = f"{config.memory.alloc_conf} {config.memory.alloc.backend}"
    known = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    return not config.dry_run and "cudaMallocAsync" in text and "cudaMallocAsync" not in known


def stop() -> None:
    """For a signal that ends the process while the config is composed: end the child, leave no run directory."""
    if _child is not None:
        _child.stop()
    if _composed is not None:
        _composed.remove_unused_directory()


def leave(code: int) -> NoReturn:
    """End the process with ``code``, not waiting for imports that nobody needs any more."""
    if _imports is None or _imports.are_done:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Child:
    """The forked process that composes."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Forks. In the child this does not return."""
        from_child, to_parent = os.pipe()
        from_parent, to_child = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self._pid = os.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
            signal.signal(signal.SIGTERM, _stop_composing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(from_child)
            os.close(to_child)
            _compose(argv, to_parent, from_parent)
        self._alive = True
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(to_parent)
        os.close(from_parent)
        self._results, self._answer = from_child, to_child

    def receive(self) -> bytes | None:
        """Wait for the pickled Composed; None if the child ended without one."""
        with open(self._results, "rb") as pipe:
            message = pipe.read()
        length = int.from_bytes(message[:LENGTH_BYTES], "little")
        return message[LENGTH_BYTES:] if length and len(message) == LENGTH_BYTES + length else None

    def let_go(self) -> None:
        """Tell the child that its job has arrived; it ends."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._answer, TAKEN)
        self.end()

    def end(self) -> int:
        """Wait for the child; the exit code for a command line that ended with it."""
        os.close(self._answer)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._alive = False
        if code < 0:
            name = signal.Signals(-code).name
            why = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
            with contextlib.suppress(OSError):
                print(f"zimage_runner: the process that composes the config was ended by {name}{why}", file=sys.stderr)
            return KILLED - code
        return code

    def stop(self) -> None:
        """End the child, giving it a moment to remove its run directory."""
        if not self._alive:
            return
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGTERM)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if os.waitpid(self._pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.002)
            os.kill(self._pid, signal.SIGKILL)


def _compose(argv: Sequence[str], results: int, answer: int) -> NoReturn:
    """The child's life."""
    code = 1

    def hand_over(composed: Composed) -> int:
        import pickle

        message = pickle.dumps(composed)
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            with open(results, "wb") as pipe:
                pipe.write(len(message).to_bytes(LENGTH_BYTES, "little") + message)
            if os.read(answer, len(TAKEN)):
                os._exit(0)
        except OSError:
            pass  # the parent is gone
        composed.remove_unused_directory()
        os._exit(1)

    try:
        from zimage_runner.cli.main import main as run

        code = run(argv, take=hand_over)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _stop_composing(number: int, _frame: FrameType | None) -> None:
    """Silently: the parent has said so, or will say how the child ended."""
    remove = getattr(sys.modules.get("zimage_runner.cli.main"), "remove_unused_directory", None)
    if remove is not None:
        remove()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(1)
