"""Whatever a power cut leaves of a run with ``fsync=item``: nothing that counted is lost, and it can be finished."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.command import command
from tests.support.crash_states import Disk, Recorder, losses
from tests.support.fault_runs import Run, check_item
from tests.support.faulty_session import FaultySession
from tests.support.shards import check_shards
from zimage_runner.cli.main import main
from zimage_runner.config.schema import Composed
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.runner import pool
from zimage_runner.runner.execute import execute
from zimage_runner.signals import StopRequest

SHARDS = ["output=shards", "output.shard_pictures=3"]
SETTINGS = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "prompts.jsonl")


class Campaign:
    """One recorded run, and what is checked of each disk that may be left of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str] = ()) -> None:
        monkeypatch.setattr(pool, "Session", FaultySession)
        monkeypatch.setenv("FAULTS", "[]")
        self.run = Run(folder / "disk", seeds=2, overrides=list(overrides))
        self.run.folder.mkdir()
        self.states = self.resumed = 0
        composed: list[Composed] = []
        words = self.run.argv()
        assert main(words, take=lambda job: composed.append(job) or 0) == 0
        self.composed = composed[0]
        self.words = [word for word in words if not word.startswith("hydra.run.dir")]
        self.recorder = Recorder(self.run.folder)
        with self.recorder.recording(monkeypatch):
            assert self.go_on() == 0
        self.run.check()
        self.settings = {name: (self.run.run_dir / name).read_bytes() for name in SETTINGS}

    def go_on(self) -> int:
        """Begin the run, or continue it where its settings are: what ``continue=DIR`` does."""
        config, directory = self.composed.config, self.run.run_dir
        directory.mkdir(exist_ok=True)
        if os.path.lexists(directory / SETTINGS[2]):
            for name in SETTINGS:
                assert (directory / name).read_bytes() == self.settings[name], name
            self.resumed += 1
            config = dataclasses.replace(config, resume=str(directory))
        return execute(dataclasses.replace(self.composed, config=config, directory=directory))  # type: ignore[return-value]

    def try_disk(self, disk: Disk, lost: set[int], torn: random.Random | None) -> None:
        disk.lay_out(lost, torn)
        self.states += 1
        ledger = disk.recorder.top.names["run"].names[RECORDS]
        counted = disk.sure(ledger)
        there = Ledger.load(self.run.run_dir / RECORDS).entries
        for item_dir, (text, seed) in self.run.items().items():
            if item_dir.encode() in counted.replace(b"\\u4e00\\u53ea\\u732b", "一只猫".encode()):
                check_item(self.run.run_dir, item_dir, there[item_dir], text, seed)
        assert self.go_on() == 0
        self.check()

    def check(self) -> None:
        """All pictures, each as in an undisturbed run."""
        ledger = Ledger.load(self.run.run_dir / RECORDS)
        assert ledger.entries.keys() == self.run.items().keys()
        for item_dir, (text, seed) in self.run.items().items():
            check_item(self.run.run_dir, item_dir, ledger.entries[item_dir], text, seed)
        if (self.run.run_dir / "shards").exists():
            check_shards(self.run.run_dir)

    def record_what_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record the process that goes on after a power cut in the middle: it may lose power too."""
        disk = Disk(self.recorder, len(self.recorder.ops) // 2)
        disk.lay_out(set(disk.uncertain()), None)
        self.recorder = Recorder(self.run.folder)
        with self.recorder.recording(monkeypatch):
            assert self.go_on() == 0


def campaign(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: int,
    subsets: int,
    twice: bool = False,
    overrides: Sequence[str] = (),
) -> Campaign:
    """``twice``: the power cuts are those of a process that goes on after one."""
    chance = random.Random(1)
    with pool.shared_executor(StopRequest()):
        tried = Campaign(folder, monkeypatch, overrides)
        if twice:
            tried.record_what_is_left(monkeypatch)
        for end in range(tried.recorder.first, len(tried.recorder.ops) + 1, step):
            disk = Disk(tried.recorder, end)
            for n, lost in enumerate(losses(disk, subsets, chance)):
                tried.try_disk(disk, lost, chance if n % 2 else None)
    return tried


def test_a_few_power_cuts(tmp_path, monkeypatch):
    tried = campaign(tmp_path, monkeypatch, step=5, subsets=2)
    assert tried.states >= 30
    assert tried.resumed >= 15
    # From the command line as well: the same words begin it or go on with it.
    for end, lost in itertools.product((10, len(tried.recorder.ops) - 20), (False, True)):
        disk = Disk(tried.recorder, end)
        disk.lay_out(set(disk.uncertain()) if lost else set(), None)
        code, _, err = command(tmp_path, *tried.words, f"continue={tried.run.run_dir}")
        assert code == 0, err
        tried.check()


def test_a_few_power_cuts_of_a_run_that_goes_on_after_one(tmp_path, monkeypatch):
    tried = campaign(tmp_path, monkeypatch, step=9, subsets=2, twice=True)
    assert tried.states >= 10
    assert tried.resumed >= tried.states


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_few_power_cuts_of_a_run_with_shards(tmp_path, monkeypatch, layout):
    tried = campaign(tmp_path, monkeypatch, step=9, subsets=2, overrides=[*SHARDS, f"output.layout={layout}"])
    assert tried.states >= 15
    assert tried.resumed >= 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_power_cuts_of_a_run_with_shards_at_every_write(tmp_path, monkeypatch, layout, twice):
    overrides = [*SHARDS, f"output.layout={layout}"]
    tried = campaign(tmp_path, monkeypatch, step=1, subsets=32, twice=twice, overrides=overrides)
    print(f"{tried.states} disks, {tried.resumed} of them resumed")
    assert tried.states >= 400


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("twice", "subsets", "least"), [(False, 128, 2000), (True, 64, 700)])
def test_power_cuts_at_every_write(tmp_path, monkeypatch, twice, subsets, least):
    tried = campaign(tmp_path, monkeypatch, step=1, subsets=subsets, twice=twice)
    print(f"{tried.states} disks, {tried.resumed} of them resumed")
    assert tried.states >= least
