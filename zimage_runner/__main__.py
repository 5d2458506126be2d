"""``python -m zimage_runner`` and the console script."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import NoReturn


def entry_point() -> None:
    """Run the command line and exit with its code. --help is answered without importing Hydra."""
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        from zimage_runner.help import help_text

        print(help_text(argv), end="")
        sys.exit(0)
    gc.disable()  # the command line's imports leave no garbage; a job switches it on again
    from zimage_runner.cli import main

    _exit(main(argv))


def _exit(code: int) -> NoReturn:
    """End the process; at once when it would only wait for libraries that it does not need any more."""
    from zimage_runner import torch_libraries

    if not torch_libraries.is_loading():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    entry_point()
