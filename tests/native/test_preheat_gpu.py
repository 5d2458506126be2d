"""On a GPU: the preheat takes the kernels that the picture takes, changes none, and leaves its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_runner.engines.native.attention import SDPA_BACKENDS, try_attention, unswitched
from zimage_runner.engines.native.preheat import PREHEAT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("name", SDPA_BACKENDS)
@torch.inference_mode()
def test_a_backend_called_directly_computes_what_it_computes_switched_to(name: str) -> None:
    attention, reason = try_attention(name, torch.bfloat16, 128)
    if attention is None:
        pytest.skip(f"{name} does not run here: {reason}")
    query, key, value = torch.randn(3, 1, 1056, 30, 128, device="cuda", dtype=torch.bfloat16)
    with attention.context():
        expected = attention.attend(query, key, value)
    assert torch.equal(unswitched(attention).attend(query, key, value), expected)


@pytest.mark.parametrize("cached", [False, True], ids=["encoding", "cached"])
def test_pictures_are_the_same(cached: bool, tmp_path: Path) -> None:
    pictures = []
    options = [f"embedding_cache.path={tmp_path / 'embeds'}"] if cached else []
    for number, switch in enumerate(("0", "0", "1", "thread")):  # the first prepares the weights and fills the cache
        folder = tmp_path / str(number)
        folder.mkdir()
        argv = ["model=zimage_nano", "model.prepare=always", "prompt=a red fox", "seeds=[1,2]", *options]
        done = subprocess.run(
            [sys.executable, "-m", "zimage_runner", *argv],
            cwd=folder,
            env=os.environ | {PREHEAT: switch, "ZIMAGE_RUNNER_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        pictures.append([np.asarray(Image.open(path)) for path in sorted(folder.rglob("image.png"))])
    for drawn in pictures[2:]:
        assert len(drawn) == 2
        assert all((a == b).all() for a, b in zip(pictures[1], drawn, strict=True))
