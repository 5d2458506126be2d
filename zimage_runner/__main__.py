"""``python -m zimage_runner`` and the console script."""

from __future__ import annotations

import gc
import sys


def entry_point() -> None:
    """Run the command line and exit with its code. --help is answered without importing Hydra."""
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        from zimage_runner.help import help_text

        print(help_text(argv), end="")
        sys.exit(0)
    gc.disable()  # the command line's imports leave no garbage; a job switches it on again
    from zimage_runner.cli import main

    sys.exit(main(argv))


if __name__ == "__main__":
    entry_point()
