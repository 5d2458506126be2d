"""Warm multiruns: one session, Hydra's numbers and directories, table, grid, exit codes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Cli = Callable[..., tuple[int, str, str]]
FAST = ["sampling.num_inference_steps=1", "warmup=none", "output.fsync=never"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Dtype of each session that was loaded."""
    from zimage_runner.session import Session

    loaded: list[str] = []
    real = Session._load

    def load(self) -> None:
        loaded.append(self.config.model.dtype.name)
        real(self)

    monkeypatch.setattr(Session, "_load", load)
    return loaded


def sweep_dir(out: str) -> Path:
    return Path(out.strip().splitlines()[-1])


def summary(sweep: Path, job: int) -> dict:
    return json.loads((sweep / str(job) / "summary.json").read_text(encoding="utf-8"))


def test_jobs_share_one_session(cli: Cli, loads: list[str]) -> None:
    code, out, err = cli(
        "-m", "prompt=a red apple", "sampling.num_inference_steps=1,2", "sampling.guidance_scale=0,2", "warmup=none"
    )
    assert code == 0, err
    sweep = sweep_dir(out)
    assert loads == ["auto"]
    assert sorted(p.name for p in sweep.iterdir()) == [
        ".hydra",
        "0",
        "1",
        "2",
        "3",
        "grid.png",
        "multirun.yaml",
        "report.html",
        *TABLES,
    ]
    for job, (steps, guidance) in enumerate([(1, 0), (1, 2), (2, 0), (2, 2)]):
        record = json.loads(next(sweep.glob(f"{job}/items/*/*/record.json")).read_text(encoding="utf-8"))
        assert (record["params"]["num_inference_steps"], record["params"]["guidance_scale"]) == (steps, guidance)
        assert (sweep / str(job) / ".hydra" / "overrides.yaml").is_file()
    assert summary(sweep, 0)["phases"]["load"] > 0
    assert summary(sweep, 1)["phases"]["load"] == 0


TABLES = ["summary.csv", "summary.md"]


def test_order_reloads_least_and_keeps_numbers(cli: Cli, loads: list[str]) -> None:
    code, out, err = cli("-m", "prompt=a red apple", "seeds=1,2,3", "model.dtype=float32,bfloat16", *FAST)
    assert code == 0, err
    assert loads == ["float32", "bfloat16"]
    for job in range(6):
        record = json.loads(next(sweep_dir(out).glob(f"{job}/items/*/*/record.json")).read_text(encoding="utf-8"))
        assert record["seed"] == job // 2 + 1
        assert record["numerics"]["dtype"] == ("float32", "bfloat16")[job % 2]


def test_new_shapes_are_warmed_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_runner.session import Session

    warmed: list[list[bool]] = []
    real = Session.warm_up
    monkeypatch.setattr(
        Session,
        "warm_up",
        lambda self, shapes: warmed.append([s.params.uses_guidance for s in shapes]) or real(self, shapes),
    )
    code, _, err = cli("-m", "prompt=a", "sampling.guidance_scale=0,2,3,0", *FAST[:1], "warmup=generate")
    assert code == 0, err
    assert warmed == [[False], [True], [], []]


def test_a_failed_job_does_not_stop_the_others(cli: Cli) -> None:
    code, out, err = cli("-m", "prompt=a red apple", "sampling.height=128,100,128", "seeds=1", *FAST)
    assert code == 2
    assert "sampling.height=100 is not a positive multiple of 16" in err
    with (sweep_dir(out) / "summary.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["status"] for row in rows] == ["complete", "refused", "complete"]
    assert [row["sampling.height"] for row in rows] == ["128", "100", "128"]


def test_keep_going_can_be_switched_off(cli: Cli) -> None:
    code, out, _ = cli(
        "-m", "prompt=a", "sampling.height=128,100,128", "seeds=1", "hydra.launcher.keep_going=false", *FAST
    )
    assert code == 2
    assert (sweep_dir(out) / "0").is_dir()
    assert not (sweep_dir(out) / "2").exists()


def test_a_crash_is_one_jobs_affair(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_runner.runner import execute as runner

    real = runner.plan_run

    def prepare(config, memo):
        if config.seeds == 2:
            raise ZeroDivisionError("a bug")
        return real(config, memo)

    monkeypatch.setattr(runner, "plan_run", prepare)
    code, out, err = cli("-m", "prompt=a", "seeds=1,2,3", *FAST)
    assert code == 1
    lines = err.splitlines()
    begin = lines.index("zimage_runner: job 1: ZeroDivisionError: a bug")
    assert lines[begin + 1] == "Traceback (most recent call last):"
    assert lines.index("ZeroDivisionError: a bug") > begin + 3
    assert "ZeroDivisionError: a bug" in err
    assert summary(sweep_dir(out), 2)["status"] == "complete"


def test_free_text_is_swept(cli: Cli) -> None:
    code, out, err = cli("-m", 'prompt="a red apple","一只猫, (8k)"', "seeds=1", *FAST)
    assert code == 0, err
    prompts = [
        json.loads(p.read_text(encoding="utf-8"))["prompt"]
        for p in sorted(sweep_dir(out).glob("*/items/*/*/record.json"))
    ]
    assert prompts == ["a red apple", "一只猫, (8k)"]


def test_one_swept_field_makes_columns_and_prompts_rows(cli: Cli) -> None:
    code, out, err = cli("-m", "prompts.texts=['a','b']", "seeds=[1,2]", "sampling.num_inference_steps=1,2", *FAST[1:])
    assert code == 0, err
    with Image.open(sweep_dir(out) / "grid.png") as grid:
        assert grid.width > 2 * 128
        assert 4 * 128 < grid.height < 5 * 160


def test_jobs_are_composed_from_files_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 ms each time: more than a job may cost beside its picture (50 ms)."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    counts = []
    real = ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(
        ConfigLoaderImpl, "_load_configuration_impl", lambda self, *args, **options: counts[-1].append(args) or
        real(self, *args, **options),
    )  # fmt: skip
    for jobs in (2, 6):
        counts.append([])
        code, _, err = cli("-m", "prompt=a", "seeds=" + ",".join(map(str, range(jobs))), *FAST)
        assert code == 0, err
    assert len(counts[0]) == len(counts[1])


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_other_launchers_work(cli: Cli, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher == "joblib" else "submitit")
    code, out, err = cli("-m", f"hydra/launcher={launcher}", "prompt=a", "sampling.height=128,100", "seeds=1", *FAST)
    assert code == 1, err
    with (sweep_dir(out) / "summary.csv").open() as table:
        assert [row["status"] for row in csv.DictReader(table)] == ["complete", "not run"]
    assert summary(sweep_dir(out), 0)["status"] == "complete"
