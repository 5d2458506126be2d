"""The copies that contestants begin with are made before anything is timed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.scenarios import SCENARIOS
from benchmarks.variants import Work


def made(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of each preparation."""
    commands: list[list[str]] = []

    def note(command: list[str], **options: Any) -> None:
        assert command[1:4] == ["-m", "zimage_runner.prepare", "build"]
        assert options["check"]
        assert "PYTHONPATH" in options["env"]
        commands.append(command[4:])

    monkeypatch.setattr(subprocess, "run", note)
    run._prepare(SCENARIOS[name](Work(model=Path("m"), images=1, size=1024, steps=8, device=device)))
    return commands


@pytest.mark.parametrize("name", ["cold_start", "throughput"])
def test_one_for_all_contestants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(name, "cuda", monkeypatch) == [["model=local", "model.path=m"]]


@pytest.mark.parametrize(("name", "device"), [("cold_start", "cpu"), ("attention", "cuda")])
def test_none_where_the_published_files_are_read(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(name, device, monkeypatch) == []
