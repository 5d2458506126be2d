"""What the native path imports: neither diffusers nor transformers, and neither torch nor OmegaConf for its start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import NANO

DRAW = f"""
import sys, torch
from pathlib import Path
from tests.support import NANO
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
model = load_model(Path({str(NANO)!r}), Options())
z = torch.randn(1, 16, 8, 8)
assert model.decode(model.denoise(model.encode(["a cat"], 512), z, 1)).wait().shape == (1, 64, 64, 3)
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        # What a process imports before torch while another one composes: nothing of what only composing needs.
        (
            "import sys; import zimage_runner.runner.execute, zimage_runner.engines.native.config",
            ["torch", "diffusers", "transformers", "numpy", "PIL", "hydra", "omegaconf", "yaml"],
        ),
        # torch._dynamo and sympy take seconds to import, jinja2 is for unknown templates.
        (DRAW, ["diffusers", "transformers", "accelerate", "torch._dynamo", "jinja2", "triton"]),
    ],
    ids=["before torch", "a picture"],
)
def test_never_imported(code: str, absent: list[str]) -> None:
    report = f"{code}\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
