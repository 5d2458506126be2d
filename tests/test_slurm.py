"""Jobs that Slurm ends early and begins again: the script of docs/scale.md, and those of submitit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fault_runs import Run, children_of
from tests.support.faulty_session import FaultySession
from tests.support.gate import ledger_lines

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
PYTHON = """#!/bin/bash
echo "$@" >> "$LOG"
trap 'sleep 0.1; exit 130' USR1
echo begun >> "$LOG"
for i in $(seq $TENTHS); do sleep 0.1; done
exit $CODE
"""


@pytest.mark.parametrize(
    ("tenths", "ends_as", "signalled", "code", "requeued"),
    [(600, 0, True, 130, True), (0, 0, False, 0, False), (0, 1, False, 1, False), (0, 2, False, 2, False)],
)
def test_a_job_whose_time_is_up_is_queued_again_and_others_are_not(
    tmp_path: Path, tenths: int, ends_as: int, signalled: bool, code: int, requeued: bool
) -> None:
    log = tmp_path / "log"
    job = begin_job(tmp_path, PYTHON, LOG=log, TENTHS=tenths, CODE=ends_as)
    until(lambda: log.exists() and "begun" in log.read_text())
    if signalled:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    said = log.read_text()
    assert f"+experiment=mine executor=ray continue={tmp_path}/runs/mine" in said
    assert ("scontrol requeue 7" in said) == requeued


def begin_job(folder: Path, python: str, **variables: object) -> subprocess.Popen[bytes]:
    """The page's job script, with ``python`` and a program that notes in ``$LOG`` what is asked of Slurm."""
    for name, text in (("python", python), ("scontrol", '#!/bin/bash\necho "scontrol $@" >> "$LOG"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0])
    surroundings = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SCRATCH": str(folder)}
    environment = os.environ | surroundings | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(["bash", str(folder / "job.sh")], env=environment)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow  # Ray is started twice
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shards", [(), ("output=shards", "output.shard_pictures=5")])
def test_the_program_with_ray_goes_on_in_the_job_that_is_queued_again(tmp_path: Path, shards: tuple[str, ...]) -> None:
    """The script and executor=ray are the page's; sessions draw at once."""
    pytest.importorskip("ray")
    run = Run(tmp_path, seeds=20, overrides=list(shards), run_dir=tmp_path / "runs" / "mine")
    plan = [word for word in run.argv() if not word.startswith("hydra.run.dir")]
    quoted = " ".join(f"'{word}'" for word in plan)
    python = f"""#!/bin/bash
shift 3  # -m zimage_runner +experiment=mine
exec {sys.executable} -m tests.support.fault_runs {quoted} "$@" >> {tmp_path}/log 2>&1
"""
    slurm = tmp_path / "slurm"
    variables = {"LOG": slurm, "FAULTS": "[]", "FAULTS_ITEM_SECONDS": 0.3, "PYTHONPATH": Path(__file__).parent.parent}
    job = begin_job(tmp_path, python, **variables)
    until(lambda: ledger_lines(run.run_dir) >= 3, 300)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 130, run.log
    assert slurm.read_text() == "scontrol requeue 7\n"
    drawn = ledger_lines(run.run_dir)
    assert drawn < 40
    run.check(complete=False)
    assert begin_job(tmp_path, python, **variables).wait(600) == 0, run.log
    assert f"{40 - drawn} done, {drawn} done before" in run.log
    run.check()


PLAN = ("prompt=a cat", 'seeds="0-5"', "warmup=none", "output.min_free_gb=0")


def test_a_job_that_submitit_begins_again_goes_on_with_its_run(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("zimage_runner.runner.pool.Session", FaultySession)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    words = (*PLAN, "hydra.run.dir=run", "hydra.job.id=12_3")
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 2, "kind": "lost"}]))
    assert cli(*words)[0] == 130
    assert ledger_lines(tmp_path / "run") == 2
    monkeypatch.setenv("FAULTS", "[]")
    assert cli(*words[:-1], "hydra.job.id=12_4")[0] == 2, "another job of the same directory"
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    code, _, err = cli(*words)
    assert code == 2
    assert "run already holds a run: continue it with resume=" in err
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    code, _, err = cli(*words)
    assert code == 0, err
    assert "4 done, 2 done before" in err
    assert ledger_lines(tmp_path / "run") == 6


@pytest.mark.slow  # three processes import torch
@pytest.mark.timeout(600)
def test_submitit_itself_begins_a_job_again(tmp_path: Path) -> None:
    """With its executor of this machine: SIGUSR2, its own signal, comes in the middle of a run."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    with log.open("wb") as file:
        words = ["-m", "hydra/launcher=submitit_local", "model=zimage_nano", *PLAN, f"hydra.sweep.dir={sweep}"]
        argv = [sys.executable, "-m", "zimage_runner", *words, 'seeds="0-29"', "sampling.num_inference_steps=1"]
        launcher = subprocess.Popen(argv, cwd=tmp_path, stdout=file, stderr=file)
    until(lambda: ledger_lines(sweep / "0") >= 3 or launcher.poll() is not None, 300)
    (controller,) = children_of(launcher.pid)
    for job in children_of(controller):
        os.kill(job, signal.SIGUSR2)
    assert launcher.wait(300) == 0, log.read_text()
    summary = json.loads((sweep / "0" / "summary.json").read_bytes())
    assert summary["status"] == "complete", summary
    assert "Requeued job" in "".join(path.read_text() for path in sweep.rglob("*_log.out"))
    assert ledger_lines(sweep / "0") == 30
