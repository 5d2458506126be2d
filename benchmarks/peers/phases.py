"""What every peer script shares: its arguments, and a clock that writes phases.json."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    """Arguments of a peer: where the model is, where pictures go, and how many are drawn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="diffusers-format directory")
    parser.add_argument("--out", type=Path, required=True, help="folder for 000.png ... and phases.json")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line, used in turn")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


class Phases:
    """Seconds between laps, and peak GPU memory, written to ``phases.json`` after every picture."""

    def __init__(self, out: Path) -> None:
        self._path = out / "phases.json"
        self._last = time.perf_counter()
        self._phases: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self._phases[name] = self._phases.get(name, 0.0) + now - self._last
        self._last = now

    def write(self, torch: Any, device: str) -> None:
        """Write what is known so far."""
        memory = {}
        if device == "cuda":
            memory = {
                "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
                "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            }
        self._path.write_text(json.dumps({"phases": self._phases, "memory": memory}, indent=1), encoding="utf-8")


def synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
