"""A signal in the first half second, while modules are imported and the config is composed: one line, exit code 130."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
from zimage_runner import __main__ as program
run = program._run
program._run = lambda argv: print("listening", flush=True) or run(argv)
program.entry_point()
"""
MOMENTS = 8
LATEST = 0.7
"""Seconds: about when a dry run ends on an idle machine."""


def started(*argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_one_line_and_130(name, moment, tmp_path: Path):
    root = tmp_path / "out"
    process = started("prompt=a fox", "dry_run=true", f"output.root={root}")
    time.sleep(random.Random(f"{name} {moment}").uniform(moment, moment + 1) / MOMENTS * LATEST)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "ignored" not in err
    assert process.returncode in ((130,) if not out else (0, 130, -getattr(signal, name)))
    if process.returncode == 130 and not out:
        (line,) = [line for line in err.splitlines() if line]
        assert name in line
    assert not list(root.glob("*"))


def test_ignored_signals_stay_ignored():
    """What a shell without job control does to the background's SIGINT."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{PROGRAM}"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
