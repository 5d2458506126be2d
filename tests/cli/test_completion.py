"""Completion of the command line: what may come next, and that real shells ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from zimage_runner.__main__ import _run
from zimage_runner.cli.completion import INSTALL, candidates


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("zimage-runner col", ["collect"]),
        ("zimage-runner re", ["report=", "reproduce", "resident", "resume=", "retry="]),
        ("zimage-runner engine=", ["engine=auto", "engine=diffusers", "engine=native"]),
        ("zimage-runner -m engine=na", ["engine=native"]),
        ("zimage-runner run +experiment=qu", ["+experiment=quickstart"]),
        ("zimage-runner run sampling.he", ["sampling.height="]),
        ("zimage-runner col 1", []),
        ("zimage-runner prompts=csv prompts.pa", ["prompts.path="]),
        ("zimage-runner prompt='a {cat}, \"or\" two' out", ["output.", "output=", "output_file="]),
        ("zimage-runner con", ["continue="]),
        ("zimage-runner continue=outputs/cats/all sampling.he", ["sampling.height="]),
        ("zimage-runner collect outputs/cats in", ["into="]),
        ("zimage-runner collect outputs/cats na", ["name="]),
        ("zimage-runner status js", ["json="]),
        ("zimage-runner nonsense=1 sampling.wi", []),
    ],
)
def test_what_may_come_next(typed: str, expected: list[str]) -> None:
    assert candidates(typed) == expected


def test_experiments_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nprompt: a cat\n"
    (tmp_path / "mine" / "experiment" / "cats.yaml").write_text(text, encoding="utf-8")
    assert candidates("zimage-runner --config-dir mine +experiment=ca") == ["+experiment=cats"]
    assert candidates("zimage-runner --config-dir=mine +experiment=ca") == ["+experiment=cats"]


def test_up_to_the_cursor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMP_LINE", "zimage-runner stat json=true")
    monkeypatch.setenv("COMP_POINT", "18")
    assert _run(["-sc", "query=bash"]) == 0
    assert capfd.readouterr().out == "status\n"


@pytest.mark.parametrize("words", [["-sc"], ["-sc", "install=csh"], ["--shell-completion", "show=bash"]])
def test_another_shell_is_refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(words) == 2
    assert "write install=, uninstall= or query= and one of bash, zsh, fish" in capfd.readouterr().err


@pytest.fixture
def shell(tmp_path: Path):
    """``shell(name, script)``: what it prints, with ``zimage-runner`` as a program on the path."""
    program = tmp_path / "bin" / "zimage-runner"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m zimage_runner "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}

    def run(name: str, script: str) -> str:
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here")
        quiet = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
        done = subprocess.run(
            [name, *quiet, "-c", script], capture_output=True, encoding="utf-8", env=environment, cwd=tmp_path,
            timeout=120, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_bash(shell) -> None:
    """As readline calls it: words are split at = too, unless told otherwise."""
    ask = """
ask() { COMP_LINE="$1"; COMP_POINT=${#1}; COMPREPLY=(); _zimage_runner; echo "${COMPREPLY[*]}"; }
ask 'zimage-runner prompt="a cat" engine=d'
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
ask 'zimage-runner status j'
complete -p zimage-runner
"""
    out = shell("bash", 'eval "$(zimage-runner --shell-completion install=bash)"' + ask).splitlines()
    assert out == ["diffusers", "json=", "complete -o default -o nospace -F _zimage_runner zimage-runner"]


def test_fish(shell) -> None:
    out = shell("fish", "zimage-runner -sc install=fish | source; complete -C 'zimage-runner run engine=d'")
    assert "engine=diffusers" in out.split()


ZSH = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; autoload -Uz compinit; compinit -u -D; eval \\"\\$(zimage-runner -sc install=zsh)\\"; echo rea''dy"
zpty -r z out '*ready*'
zpty -w -n z $'zimage-runner run engine=d\\t'
zpty -r -m z out '*=diffusers*'
print -r -- ok
"""


def test_zsh(shell) -> None:
    """In a terminal, with the tabulator key."""
    assert shell("zsh", ZSH) == "ok\n"


def test_every_shell_is_documented() -> None:
    page = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
    assert all(f"install={name}" in page for name in INSTALL)
