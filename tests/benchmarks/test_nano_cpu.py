"""The comparison on the CPU: both engines draw, and the figures are made of the times that were taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import nano_cpu


def test_ratios_are_medians_over_pictures() -> None:
    rows = {"diffusers": [[1.0, 2.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 1.0]], "native": [[0.0, 1.0, 1.0]] * 3}
    found = nano_cpu.compare(rows)
    assert found["ratio"] == 2.0
    assert found["ratio_denoise_decode"] == 1.5
    assert found["diffusers"]["picture"] == {"min": 3.0, "median": 4.0}  # type: ignore[index]
    assert found["native"]["denoise"] == {"min": 1.0, "median": 1.0}  # type: ignore[index]


def test_both_engines_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    output, threads = tmp_path / "out.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["nano_cpu", "--pictures", "1", "--threads", "1", "--output", str(output)])
    try:
        assert nano_cpu.main() == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["pictures"] == 1
    assert all(found[engine][phase]["min"] > 0 for engine in ("diffusers", "native") for phase in nano_cpu.PHASES)
