"""torch's threads on the CPU: as many as asked for, and asleep while they wait unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.drawing import SMALL, items, session_config
from zimage_runner.engines import threads
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.memory.policies import Resident
from zimage_runner.session import Session

CLEAN = {name: value for name, value in os.environ.items() if name not in (*threads.WAITING, "OMP_NUM_THREADS")}


@pytest.mark.parametrize("number", [1, 2, None])
def test_torch_computes_with_as_many_as_asked_for(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before, seen = torch.get_num_threads(), []
    session = Session(session_config(NativeEngine(threads=number), Resident()), [])
    session.start()
    assert session.report()["threads"] == (number or before)
    denoise = session.engine.denoise
    monkeypatch.setattr(
        session.engine, "denoise", lambda request: seen.append(torch.get_num_threads()) or denoise(request)
    )
    session.generate(items(1, SMALL)).images.wait()
    session.close()
    assert seen == [number or before]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("set_by_user", "policy"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "7"}, None),
        ({"KMP_BLOCKTIME": "1"}, None),
    ],
)
def test_what_the_user_set_stays(
    set_by_user: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", CLEAN | set_by_user)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    threads.wait_passively()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ.get("GOMP_SPINCOUNT") == (threads.SPINS if not set_by_user else set_by_user.get("GOMP_SPINCOUNT"))
    assert set_by_user.items() <= os.environ.items()


def test_nothing_is_set_where_it_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401

    monkeypatch.setattr(os, "environ", dict(CLEAN))
    threads.wait_passively()
    assert os.environ == CLEAN


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_torchs_own_runtime_has_read_it(executor: str, tmp_path: Path) -> None:
    """OMP_DISPLAY_ENV: OpenMP says on loading what it was told."""
    words = ["prompt=a cat", "sampling.num_inference_steps=1", f"executor={executor}", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "zimage_runner", *words, "engine.threads=1", "warmup=none"],
        cwd=tmp_path, env=CLEAN | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=200, check=False, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in done.stderr
    assert '"threads": 1' in (tmp_path / "run" / "summary.json").read_text(encoding="utf-8")
