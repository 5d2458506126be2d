"""Shared by the weights tests: a runner cache of their own and copies of the embedded checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.fake_cuda import driver, pace  # noqa: F401 (fixtures)
from zimage_runner.weights.find.resolve import EMBEDDED


@pytest.fixture(autouse=True)
def runner_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runner's cache of this test; hub variables are restored after it."""
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "runner_cache"))
    for variable in ("MODELSCOPE_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "set before deletion, so that the test's own change is undone")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "runner_cache"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "nano", ignore=shutil.ignore_patterns("MODEL_CARD.md", "NOTICES")))


@pytest.fixture
def sharded(nano: Path) -> Path:
    """The same with its transformer in fp32 and in three shards with an index, as Z-Image-Turbo is published."""
    import json

    from safetensors.torch import load_file, save_file

    folder = nano / "transformer"
    single = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(single).items()}
    single.unlink()
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return nano
