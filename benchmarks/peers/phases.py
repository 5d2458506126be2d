"""What every peer script shares: its arguments, a clock that writes phases.json, and the loop over the prompts."""

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


def draw(args: argparse.Namespace, clock: Phases, torch: Any, pipe: Any, **more: Any) -> None:
    """The loop of every peer: a prompt after the other, each picture saved before the next. ``more``: of the call."""
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    for n in range(args.images):
        image = pipe(
            prompts[n % len(prompts)],
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=0.0,
            **more,
        ).images[0]
        clock.lap("first_image" if n == 0 else "later_images")
        image.save(args.out / f"{n:03d}.png")
        clock.lap("first_png" if n == 0 else "later_pngs")
        clock.write(torch, args.device)


def synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
