"""``python -m zimage_runner`` and the console script."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would come before signals are listened to
    from types import FrameType

EXIT_INTERRUPTED = 130


def entry_point() -> None:
    """Run the command line and exit with its code. --help is answered without importing Hydra."""
    listen()
    _replace_closed_streams()
    code = _run(sys.argv[1:])
    leave = getattr(sys.modules.get("zimage_runner.startup.fork"), "leave", sys.exit)
    leave(code)


def listen() -> None:
    """Answer SIGINT and SIGTERM with one line and code 130 until a run listens to them itself (signals.py)."""
    for number in (signal.SIGINT, signal.SIGTERM):
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


def _run(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        from zimage_runner.cli.help import help_text
        from zimage_runner.errors import UserError

        try:
            print(help_text(argv), end="")
        except UserError as error:
            from zimage_runner.logs import refuse

            return refuse(str(error))
        return 0
    if "--version" in argv:
        from zimage_runner import __version__

        print(f"zimage_runner {__version__}")
        return 0
    from zimage_runner.startup.process import begin

    if begin():
        gc.disable()  # the command line's imports leave no garbage; a job switches it on again
        from zimage_runner.startup import fork

        if fork.pays(argv):
            return fork.main(argv)
    from zimage_runner.cli.main import main

    return main(argv)


if __name__ == "__main__":
    entry_point()
