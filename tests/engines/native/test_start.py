"""The weights are on their way before torch is imported: that is where the start's seconds are saved."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import os, sys
from zimage_runner.weights.preload import source
source.begin = lambda *args: (print("torch" in sys.modules, flush=True), os._exit(0))
from zimage_runner.cli.main import main
sys.exit(main(sys.argv[1:]) or 1)
"""


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_weights_begin_before_torch(engine, tmp_path):
    options = [f"engine={engine}", "prompt=a fox", f"output.root={tmp_path}", "sampling.num_inference_steps=1"]
    command = [sys.executable, "-c", PROBE, "model=zimage_nano", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
