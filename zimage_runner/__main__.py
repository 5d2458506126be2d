"""``python -m zimage_runner`` and the console script: a run, or the command that the first word names."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would come before signals are listened to
    from types import FrameType

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU)


def entry_point() -> None:
    """Run the command line and exit with its code. --help is answered without importing Hydra."""
    _use_utf8()
    listen()
    _replace_closed_streams()
    code = whatever_happens(sys.argv[1:])
    leave = getattr(sys.modules.get("zimage_runner.startup.fork"), "leave", sys.exit)
    leave(code)


def whatever_happens(argv: list[str]) -> int:
    """Do what the words say. Where the system refused memory so that nothing could be said of it, say it here."""
    try:
        return _run(argv)
    except RuntimeError as error:
        from zimage_runner.errors import NO_HOME, is_homeless
        from zimage_runner.logs import refuse

        if not is_homeless(error):
            raise
        return refuse(f"a path begins with ~, and {NO_HOME}")
    except MemoryError:
        os.write(2, b"zimage_runner: out of memory: what is finished is kept; end other programs, then resume\n")
        return EXIT_INTERRUPTED


def _use_utf8() -> None:
    """Begin anew in Python's UTF-8 mode under a locale that has few letters: prompts and file names have any.

    The command line was read as the locale says, and what is printed is written as it says.
    """
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or os.environ.get("PYTHONUTF8") == "1":
        return
    terminal = getattr(sys.stdout, "encoding", None) or "ascii"
    environment = {**os.environ, "PYTHONUTF8": "1"}
    environment.setdefault("PYTHONIOENCODING", f"{terminal}:backslashreplace")
    words = [word.encode("utf-8", "surrogateescape") for word in (sys.executable, *sys.orig_argv[1:])]
    with contextlib.suppress(OSError):  # else as well as it goes
        os.execve(sys.executable, words, environment)


def listen() -> None:
    """Answer a request to end with one line and code 130 until a run listens itself (signals.py)."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def _replace_closed_streams() -> None:
    """Let what goes to a closed standard stream (``2>&-``) go nowhere: else the next file opened would get it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _stop(number: int, _frame: FrameType | None) -> None:
    """End here: an exception raised in the middle of an import may be swallowed by it."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"zimage_runner: stopped by {signal.Signals(number).name}\n".encode())
    for module, function in (("cli.main", "remove_unused_directory"), ("startup.fork", "stop")):
        clean_up = getattr(sys.modules.get(f"zimage_runner.{module}"), function, None)
        if clean_up is not None:
            clean_up()
    os._exit(EXIT_INTERRUPTED)


_stop.is_for_the_start = True  # pyright: ignore[reportFunctionMemberAccess]


def _print(text: str) -> int:
    """Print an answer; the exit code."""
    from zimage_runner.logs import say

    return 0 if say(text, sys.stdout) else EXIT_BAD_INPUT


def _run(argv: list[str]) -> int:
    from zimage_runner.cli.commands import MODULES, command_of

    command, words = command_of(argv)
    try:
        os.getcwd()
    except FileNotFoundError:  # neither paths nor torch's libraries would be found
        from zimage_runner.logs import refuse

        return refuse("the current folder has been deleted: cd to another one, or make it again and cd to it")
    return _other(command, words) if command in MODULES else _draw(words)


def _other(command: str, argv: list[str]) -> int:
    """Call another command's ``main``, as ``python -m zimage_runner.<command>`` does."""
    from zimage_runner.cli.commands import DRAWING, MODULES

    if command in DRAWING and not {"--help", "-h"} & set(argv):
        from zimage_runner.startup.process import begin

        begin()
    from importlib import import_module

    main = import_module(MODULES[command]).main
    for number in SIGNALS:  # it deals with them in its own way
        if hasattr(signal.getsignal(number), "is_for_the_start"):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        return main(argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _draw(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        from zimage_runner.cli.help import help_text
        from zimage_runner.errors import UserError

        try:
            text = help_text(argv)
        except UserError as error:
            from zimage_runner.logs import refuse

            return refuse(str(error))
        return _print(text.removesuffix("\n"))
    if {"--shell-completion", "-sc"} & set(argv):
        from zimage_runner.cli.completion import completion
        from zimage_runner.errors import UserError

        try:
            text = completion(argv)
        except UserError as error:
            from zimage_runner.logs import refuse

            return refuse(str(error))
        return _print(text.removesuffix("\n"))
    if "--version" in argv:
        from zimage_runner import __version__

        return _print(f"zimage_runner {__version__}")
    from zimage_runner.startup.process import begin

    begins = begin()
    from zimage_runner.executors.handing import draw

    return draw(argv, lambda: _compose_and_draw(argv, begins))


def _compose_and_draw(argv: list[str], begins: bool) -> int:
    if begins:
        gc.disable()  # the command line's imports leave no garbage; a job switches it on again
        from zimage_runner.startup import fork

        if fork.pays(argv):
            return fork.main(argv)
    from zimage_runner.cli.main import main

    return main(argv)


if __name__ == "__main__":
    entry_point()
