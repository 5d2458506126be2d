"""The same promises with the embedded model itself: weights that are damaged, and runs killed while it draws."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.fault_runs import all_gone, children_of, kill
from zimage_runner.session import Session

SEEDS = 5
SKETCHES = Path(__file__).parents[2] / "conf/pictures"


@pytest.mark.parametrize("executor", ["inline", "process"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_truncated_weights_are_found_before_anything_starts(cli, nano, tmp_path, executor, part):
    model = Path(shutil.copytree(nano, tmp_path / "model"))
    file = next((model / part).glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1000)
    code, _, err = cli(
        "model=local", f"model.path={model}", "prompt=a cat", f"executor={executor}", "hydra.run.dir=run",
        "sampling.height=128", "sampling.width=128",
    )  # fmt: skip
    assert code == 2
    assert file.name in err
    assert len(err.splitlines()) == 1
    assert not list((tmp_path / "run").rglob("*"))


@pytest.mark.parametrize(
    ("part", "row"),
    [("text_encoder", {"text": "a cat"}), ("vae", {"text": "a cat", "image": str(SKETCHES / "cat.png")})],
)
def test_weights_that_are_damaged_during_a_run_end_it_and_it_is_resumed(cli, nano, tmp_path, monkeypatch, part, row):
    """Each picture that was left failed for itself, and a resumed run took them for finished."""
    model = Path(shutil.copytree(nano, tmp_path / "model"))
    file = next((model / part).glob("*.safetensors"))
    whole = file.read_bytes()
    rows = [{"text": "a red apple"}, row, {**row, "text": "a dog"}]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    generate = Session.generate

    def damaging(*arguments, **named):
        done = generate(*arguments, **named)
        os.truncate(file, 1000)
        return done

    monkeypatch.setattr(Session, "generate", damaging)
    sizes = ("sampling.height=128", "sampling.width=128", "sampling.num_inference_steps=1")
    code, _, err = cli(
        "model=local", f"model.path={model}", "prompts=jsonl", "prompts.path=rows.jsonl", "hydra.run.dir=run",
        "warmup=none", *sizes,
    )  # fmt: skip
    summary = json.loads(Path("run/summary.json").read_bytes())
    assert (code, summary["status"]) == (130, "stopped")
    assert {name: summary["items"][name] for name in ("ok", "failed", "remaining")} == {
        "ok": 1, "failed": 0, "remaining": 2
    }  # fmt: skip
    assert str(file) in summary["stopped"]
    assert len([line for line in err.splitlines() if file.name in line]) == 1
    assert "Traceback" not in err
    monkeypatch.undo()
    file.write_bytes(whole)
    assert cli(f"resume={tmp_path / 'run'}")[0] == 0


def start(folder: Path, executor: str) -> subprocess.Popen:
    run = folder / "run"
    words = [f"resume={run}"] if (run / ".hydra/overrides.yaml").exists() else [
        "prompt=a red apple", f'seeds="0-{SEEDS - 1}"', f"hydra.run.dir={run}", f"executor={executor}", "warmup=none",
    ]  # fmt: skip
    with open(folder / "log", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "zimage_runner", *words], stdout=log, stderr=log, cwd=folder)


def pictures(run: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(run)): np.asarray(Image.open(p)) for p in run.rglob("image.png")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "inline")
    assert process.wait(120) == 0, (folder / "log").read_text(encoding="utf-8")
    return pictures(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "process"])
def test_killed_and_resumed_the_pixels_are_the_same(tmp_path, undisturbed, executor):
    records = tmp_path / "run" / "records.jsonl"
    for wanted in (1, 3):
        process = start(tmp_path, executor)
        deadline = time.monotonic() + 120
        while not (records.exists() and records.read_bytes().count(b"\n") >= wanted) and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = children_of(process.pid)
        kill(process.pid)
        process.wait()
        assert all_gone(workers)
    assert start(tmp_path, executor).wait(120) == 0, (tmp_path / "log").read_text(encoding="utf-8")
    again = pictures(tmp_path / "run")
    assert again.keys() == undisturbed.keys()
    assert all((again[name] == undisturbed[name]).all() for name in again)


@pytest.mark.slow
def test_a_killed_worker_changes_no_pixel(tmp_path, undisturbed):
    process = start(tmp_path, "process")
    records = tmp_path / "run" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    for worker in children_of(process.pid):
        kill(worker)
    assert process.wait(120) == 0, (tmp_path / "log").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run/summary.json").read_bytes())["session"]["executor"]["restarts"] == 1
    again = pictures(tmp_path / "run")
    assert again.keys() == undisturbed.keys()
    assert all((again[name] == undisturbed[name]).all() for name in again)
