"""Results of benchmarks as benchmarks/run.py writes them."""

from __future__ import annotations

import json
from pathlib import Path


def run(variant: str, first: float, intervals: list[float], number: int = 0, **more) -> dict:
    readings = {
        "phases": {"import": 1.0, "to_device": 0.5, "load": 2.0, "warm_up": 0.25},
        "memory": {"peak_allocated_gb": 20.0, "peak_reserved_gb": 23.0},
        "images": {"first_seconds": 0.75},
        "engine": "diffusers",
    }
    return {
        "variant": variant, "cache": "warm", "round": number, "returncode": 0, "wall_seconds": first + 1,
        "first_png_seconds": first, "intervals": intervals, "readings": readings, "log_tail": "", **more,
    }  # fmt: skip


def results(folder: Path, runs: list[dict], scenario: str = "ablation") -> Path:
    path = folder / f"{scenario}.json"
    facts = {"gpu": None, "processor": "test", "cores": 2, "versions": {"torch": "2"}, "bf16_matmul_tflops": None}
    path.write_text(
        json.dumps(
            {
                "scenario": scenario, "title": "The title", "prediction": "we expect", "started": "2026-02-03T04:05:06",
                "machine": facts, "work": {"images": 4, "size": 1024, "steps": 8, "model": "m", "device": "cuda"},
                "variants": {r["variant"]: {"ours": True, "env": {}, "overrides": []} for r in runs}, "runs": runs,
            }
        )
    , encoding="utf-8")  # fmt: skip
    return path
