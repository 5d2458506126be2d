"""``import torch`` and the CUDA context begin with the process, while a forked child composes the config.

Composing (Hydra, OmegaConf, the grammar) takes a third of a second, importing torch a second, and in one process they
come one after the other: both hold the interpreter's lock. So the process forks before anything else. The child goes
through the command line as ever (cli.py) and sends the composed job through a pipe; a command line that ends without
one (a typo, a refusal) ends both with the child's code and the child's words. Meanwhile a thread of the parent imports
the runner and torch, and another creates the CUDA context.

Only where torch and the GPU are likely wanted (``pays``). All else goes through cli.py in one process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # nothing is imported before the fork that can come after it
    from collections.abc import Sequence
    from types import FrameType, ModuleType
    from typing import NoReturn

    from zimage_runner.config.schema import RunConfig
    from zimage_runner.runner.composed import Composed
    from zimage_runner.weights.preload.page_cache import CudaContext

HEAD_START = "ZIMAGE_RUNNER_HEAD_START"
"""Environment variable: 0 composes in this process, before torch is imported; 1 forks wherever the command line allows
it, even without a GPU or a second CPU."""
DEVICE_NODES = ("/dev/nvidiactl", "/dev/dxg")
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
    switch = os.environ.get(HEAD_START, "")
    if switch == "0" or not hasattr(os, "fork") or not sys.platform.startswith("linux"):
        return False
    if threading.active_count() > 1 or not all(map(_is_plain, argv)):
        return False
    return switch == "1" or (_sees_gpu() and len(os.sched_getaffinity(0)) > 1)


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
        (key == "dry_run" and value.lower() not in ("false", "no", "off", "0"))
        or (key == "executor" and value != "inline")
        or (key == "engine" and value != "native")
        or (key == "engine.device" and value == "cpu")
    )


def _sees_gpu() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    return visible not in ("", "-1") and any(map(os.path.exists, DEVICE_NODES))


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code, as cli.main does."""
    global _child, _composed, _imports
    _child = Child(argv)
    wait_without_spinning()
    _imports = Imports()
    message = _child.receive()
    if message is None:
        return _child.end()
    import pickle

    from zimage_runner.exit_codes import EXIT_INTERRUPTED, refuse
    from zimage_runner.logs import log_to_terminal
    from zimage_runner.runner.execute import execute

    _composed = composed = pickle.loads(message)
    _child.let_go()
    log_to_terminal()
    try:
        if needs_backend_early(composed.config):
            composed.remove_unused_directory()
            return refuse(
                "memory.alloc.backend=cudaMallocAsync has to be known when torch is imported: give it on the command "
                f"line, or set {HEAD_START}=0 in the environment"
            )
        _imports.suit(composed.config)
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


def wait_without_spinning() -> None:
    """Before torch is imported: threads that wait for work must not spin for long, unless the user set it otherwise.

    On a machine that is busy with anything else, OpenMP's default made the embedded model twenty times slower. This
    little keeps the speed of an idle one.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def import_torch() -> ModuleType:
    """torch, imported lean; where that began with the process, once it is done."""
    if _imports is not None:
        _imports.wait()
    from zimage_runner.startup.lean_torch import import_torch_lean

    return import_torch_lean()


def stop() -> None:
    """For a signal that ends the process while the config is composed: end the child, leave no run directory."""
    if _child is not None:
        _child.stop()
    if _composed is not None:
        from zimage_runner.runner.composed import remove_with_name

        remove_with_name(_composed.directory)


def leave(code: int) -> NoReturn:
    """End the process with ``code``, not waiting for imports that nobody needs any more."""
    if _imports is None or _imports.are_done:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Imports:
    """The runner, then torch, in a thread; the CUDA context in another."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._context: CudaContext | None = None
        self._thread = threading.Thread(target=self._import, name="import", daemon=True)
        self._thread.start()

    @property
    def are_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until torch is there; raises what went wrong."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def suit(self, config: RunConfig) -> None:
        """Give back what turned out not to be wanted; engines that import torch their own way wait for it here."""
        if config.dry_run or _is_native_here(config):
            return
        self.wait()
        if self._context is not None:
            self._context.release()

    def _import(self) -> None:
        from zimage_runner.startup.gil import switch_as_usual, switch_quickly

        switch_quickly()
        try:
            from zimage_runner.weights.preload.source import torch_is_cpu_only

            if _sees_gpu() and not torch_is_cpu_only():
                from zimage_runner.weights.preload.page_cache import CudaContext

                self._context = CudaContext(pin=True)
            import zimage_runner.runner.execute  # noqa: F401 - what the main thread needs as soon as it has the config
            from zimage_runner.startup.lean_torch import import_torch_lean

            import_torch_lean()
        except BaseException as error:
            self._error = error
        finally:
            gc.enable()  # switched off when the process began
            switch_as_usual()


def _is_native_here(config: RunConfig) -> bool:
    """Whether the native engine will draw on the GPU, in this process."""
    if type(config.executor).__name__ != "InlineExecutorConfig" or config.engine.device.value == "cpu":
        return False
    takes_native = getattr(config.engine, "takes_native", None)
    if takes_native is not None:  # engine=auto
        return takes_native(config.model, config.memory, config.compile)
    return type(config.engine).__name__ == "NativeEngine"


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
