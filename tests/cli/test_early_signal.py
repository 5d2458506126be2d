"""A signal in the first half second, while modules are imported and the config is composed: one line, exit code 130."""

from __future__ import annotations

import os
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
MOMENTS = 4
LATEST = 0.7
"""Seconds: about when a dry run ends on an idle machine."""


def started(*argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        pytest.param(name, moment, marks=[pytest.mark.slow] if (moment + n) % 2 else [])
        for n, name in enumerate(["SIGTERM", "SIGINT"])
        for moment in range(MOMENTS)
    ],
)
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
        [sys.executable, "-c", code, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


IMPORTING = """
import sys, time
from importlib.abc import MetaPathFinder

class Slow(MetaPathFinder):
    \"\"\"torch's import, which says when it has begun and when it is done, in one of its modules.\"\"\"
    def find_spec(self, name, path, target=None):
        if name == "torch.nn":
            print("importing", flush=True)
            time.sleep(0.3)
        return None

sys.meta_path.insert(0, Slow())
from zimage_runner.__main__ import entry_point
entry_point()
"""


@pytest.mark.parametrize(
    ("plain", "signals"),
    [
        pytest.param("", 1, id="lean"),
        pytest.param("1", 1, id="plain", marks=pytest.mark.slow),  # what a signal does there is the same
        pytest.param("", 2, id="lean, twice"),
        pytest.param("1", 2, id="plain, twice", marks=pytest.mark.slow),  # the second does not ask how torch comes
    ],
)
def test_while_torch_is_imported(plain, signals, tmp_path: Path):
    """The first ends the run once the import is done, the second at once; neither shows a traceback or aborts."""
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, "model=zimage_nano", "prompt=a fox", f"output.root={tmp_path / 'out'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ZIMAGE_RUNNER_PLAIN_START": plain},
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert "ignored" not in err
    said = ["SIGINT: stopping; once more to exit at once", "exiting at once; finished pictures are kept"]
    assert [line for line in err.splitlines() if line in said] == said[:signals]
    if signals == 1:
        assert not list(tmp_path.glob("out/run/*"))


def test_a_refusal_needs_no_open_stream(tmp_path: Path):
    command = f"{sys.executable} -m zimage_runner no.such=1 <&- >&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, cwd=tmp_path, encoding="utf-8"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_run_with_closed_stderr_draws(tmp_path: Path):
    size = "sampling.height=128 sampling.width=128"
    command = f"{sys.executable} -m zimage_runner model=zimage_nano prompt=fox {size} 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path, encoding="utf-8"
    )
    assert done.returncode == 0
    assert len(list(tmp_path.rglob("image.png"))) == 1
    assert done.stdout.count("\n") == 1  # the run directory


@pytest.mark.parametrize(("words", "code"), [("--version", 2), ("--help", 2), ("prompt=a dry_run=true", 2), ("x=1", 2)])
def test_a_full_disk_behind_stdout_is_one_line_and_2(tmp_path: Path, words: str, code: int):
    """Python itself ends with 120 for what it could not write."""
    command = f"{sys.executable} -m zimage_runner {words} > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert ("No space left on device" in done.stderr) == (words != "x=1")


def test_a_full_disk_behind_stderr_changes_no_exit_code(tmp_path: Path):
    for words, code in (("x=1", 2), ("prompt=a dry_run=true", 0)):
        command = f"{sys.executable} -m zimage_runner {words} 2> /dev/full"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert (done.returncode, bool(done.stdout)) == (code, not code)
