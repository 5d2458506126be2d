"""Who writes with executor=ray: this process or the workers. Whole runs over simulated workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.shards import check_shards
from tests.support.simulated_fleet import REPORT, SimulatedFleet
from zimage_runner.errors import UserError
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.executors.ray_pool import RayExecutor
from zimage_runner.memory.policies import Health
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory

RUN = (
    "executor=ray", 'seeds="0-9"', "prompts.texts=[a cat,a dog]", "warmup=none", "output.min_free_gb=0",
    "hydra.run.dir=run",
)  # fmt: skip


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> SimulatedFleet:
    """The workers of the runs that the test starts."""
    made = SimulatedFleet(3)
    made.reports = dict.fromkeys(range(100), REPORT | {"device_name": "none"})

    def create(self: RayExecutorConfig, make_session: Any, *, health: Any = None, stop: Any = None, **_: Any) -> Any:
        return RayExecutor(self, made, health or Health(), stop)

    monkeypatch.setattr(RayExecutorConfig, "create", create)
    return made


def pictures(run: Path) -> dict[str, bytes]:
    return {path.parent.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("image.png")}


@pytest.mark.parametrize("fsync", ["item", "run"])
def test_workers_on_shared_storage_write_the_same_files(cli, tmp_path, fleet, fsync):
    code, _, err = cli(*RUN, f"output.fsync={fsync}")
    assert code == 0, err
    sent = pictures(tmp_path / "run")
    assert len(sent) == 20
    assert {sink for sink, _ in fleet.sinks.values()} == {None}, "on one machine this process writes"
    (tmp_path / "run").rename(tmp_path / "by_driver")
    fleet.elsewhere = True
    code, _, err = cli(*RUN, f"output.fsync={fsync}")
    assert code == 0, err
    assert all(sink is not None for sink, _ in fleet.sinks.values())
    assert not fleet.unseen
    assert pictures(tmp_path / "run") == sent
    ledger = Ledger.load(tmp_path / "run" / "records.jsonl")
    assert len(ledger.entries) == 20
    assert all(entry.ok for entry in ledger.entries.values())
    theirs = Ledger.load(tmp_path / "by_driver" / "records.jsonl").entries
    assert theirs == ledger.entries
    record, other = (
        json.loads((tmp_path / run / next(iter(sent)) / "record.json").read_bytes()) for run in ("run", "by_driver")
    )
    assert record.keys() == other.keys()
    assert {k for k in record if record[k] != other[k]} <= {"written", "seconds", "worker"}
    assert not (tmp_path / "run" / ".workers").exists()
    assert "nothing to draw" in cli("resume=run", "verify=true", "executor=ray")[2]


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_workers_on_shared_storage_write_shards_of_their_own(cli, tmp_path, fleet, layout):
    fleet.elsewhere = True
    code, _, err = cli(*RUN, "output=shards", f"output.layout={layout}", "output.shard_pictures=4")
    assert code == 0, err
    check_shards(tmp_path / "run")
    entries = Ledger.load(tmp_path / "run" / "records.jsonl").entries
    assert len([entry for entry in entries.values() if entry.ok and entry.place is not None]) == 20
    assert "nothing to draw" in cli("resume=run", "verify=true", "executor=ray")[2]


def test_workers_that_do_not_see_the_directory_send(cli, tmp_path, fleet, monkeypatch):
    fleet.elsewhere = True
    monkeypatch.setattr(RunDirectory, "admit_workers", lambda self: "another")
    assert cli(*RUN)[0] == 0
    assert len(pictures(tmp_path / "run")) == 20
    assert fleet.unseen
    assert "is not to be seen on" in fleet.unseen[0]


@pytest.mark.parametrize(("writes", "asked"), [("driver", False), ("worker", True), ("auto", False)])
def test_who_is_asked_to_write(cli, fleet, writes, asked):
    assert cli(*RUN, f"executor.writes={writes}")[0] == 0
    assert {(sink is not None, must) for sink, must in fleet.sinks.values()} == {(asked, writes == "worker")}


def test_a_picture_that_is_none_is_drawn_once_more(cli, tmp_path, fleet):
    """A worker says that it wrote nothing; the second attempt goes well."""
    fleet.elsewhere = True
    right: Callable[..., Any] = fleet._draw

    def draw(batch: Any, sink: Any) -> Any:
        parts = right(batch, None)
        if batch.attempt == 1 and batch.items[0].seed == 3:
            parts[0].pixels[:] = 0
        return [type(part)(positions=part.positions, written=sink.write(batch.items, part.pixels, {}, batch.attempt))
                for part in parts]  # fmt: skip

    fleet._draw = draw
    assert cli(*RUN)[0] == 0
    assert len(pictures(tmp_path / "run")) == 20
    record = json.loads(next((tmp_path / "run").glob("items/*/seed_3/record.json")).read_bytes())
    assert record["attempt"] == 2


def test_join_wants_the_token(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run_dir:
        token = run_dir.admit_workers()
        RunDirectory.join(run_dir.path, token).close()
        for path, wrong in ((run_dir.path, "0" * 32), (tmp_path / "elsewhere", token)):
            with pytest.raises(UserError, match=r"is not to be seen on .*executor\.writes=driver"):
                RunDirectory.join(path, wrong)
        run_dir.dismiss_workers()
        with pytest.raises(UserError):
            RunDirectory.join(run_dir.path, token)


def test_jobs_of_a_multirun_share_the_workers(cli, tmp_path, fleet):
    fleet.elsewhere = True
    words = [word for word in RUN if not word.startswith("hydra.run.dir")]
    code, _, err = cli("-m", *words, "name=one,two", "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert len(pictures(tmp_path / "sweep" / "0")) == len(pictures(tmp_path / "sweep" / "1")) == 20
    for job in "01":
        summary = json.loads((tmp_path / "sweep" / job / "summary.json").read_bytes())
        assert sum(worker["images"] for worker in summary["session"]["executor"]["workers"]) == 20
    assert len(fleet.hired) == 3, "the second job has the first one's workers"
    assert all(sink.directory.endswith("sweep/1") for sink, _ in fleet.sinks.values())
