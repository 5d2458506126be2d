"""Command lines run in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

SMALL = ("model.native_sizes=[]", "sampling.height=64", "sampling.width=64")
"""For runs of the embedded model whose pictures nobody looks at: a quarter of the time."""


def command(folder: Path, *argv: str) -> tuple[int, str, str]:
    """Run one command line in that folder: (exit code, stdout, stderr). For fixtures that outlive a test."""
    from zimage_runner.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()
