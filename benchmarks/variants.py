"""What is compared: peers as scripts of their own, and this runner through its command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "prompts.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What every variant of a scenario has to draw."""

    model: Path
    images: int
    size: int
    steps: int
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One contestant: a command line, run in a fresh process."""

    name: str
    overrides: tuple[str, ...] | None = None
    """Hydra overrides of this runner; None for a peer."""
    script: str | None = None
    """A peer's script below ``peers/``."""
    images: int | None = None
    """Fewer (or more) pictures than the scenario's, for variants that are very slow."""
    env: dict[str, str] = field(default_factory=dict)
    fresh_compiler: bool = False
    """Compile from nothing, as on the first run on a machine; otherwise the compiler's cache is as it was left."""
    primed: bool = False
    """Run once before the first round, uncounted: the compiler's cache is then that of an earlier run."""
    uses_model: str = "published"
    """Key of the model directory: published (fp32 transformer) or bf16."""
    is_ours: bool = True

    def command(self, work: Work, out: Path) -> list[str]:
        """The command line; pictures and readings go below ``out``."""
        if self.script is not None:
            return [
                sys.executable, str(HERE / "peers" / self.script), "--model", str(work.model), "--out", str(out),
                "--prompts", str(PROMPTS), "--images", str(work.images), "--size", str(work.size),
                "--steps", str(work.steps), "--device", work.device,
            ]  # fmt: skip
        prompts = len(PROMPTS.read_text(encoding="utf-8").splitlines())
        compiler = [f"compile.cache_dir={out / 'compiled'}"] if self.fresh_compiler else []
        seeds = max(1, -(-work.images // prompts))
        return [
            sys.executable, "-m", "zimage_runner", "model=local", f"model.path={work.model}", "name=bench",
            f"output.root={out / 'runs'}", "prompts=text_file", f"prompts.path={PROMPTS}",
            f"prompts.limit={min(work.images, prompts)}", f"seeds='0-{seeds - 1}'", f"engine.device={work.device}",
            f"sampling.height={work.size}", f"sampling.width={work.size}",
            f"sampling.num_inference_steps={work.steps}", *(self.overrides or ()), *compiler,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """The child's environment: this checkout importable, no progress bars, the variant's own settings."""
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"} | self.env


def readings(variant: Variant, out: Path) -> dict[str, Any]:
    """Phases (seconds) and memory (GB) that the process left; empty when it died before writing any."""
    if variant.script is not None:
        path = out / "phases.json"
        return json.loads(path.read_text()) if path.exists() else {}
    summaries = sorted((out / "runs").rglob("summary.json"))
    if not summaries:
        return {}
    summary = json.loads(summaries[-1].read_text())
    session = summary["session"]
    return {
        "phases": {**session["load_phases"], **session["phases"]},
        "memory": {k: v for k, v in session.get("gpu_memory", {}).items() if k.startswith("peak")},
        "warmup_passes": session.get("warmup_passes", []),
        "images": summary["images"],
        "attention": session.get("attention"),
        "engine": session.get("numerics", {}).get("engine"),
    }


def ours(name: str, *overrides: str, **options: Any) -> Variant:
    """A variant of this runner."""
    return Variant(name=name, overrides=overrides, **options)


def peer(name: str, script: str, **options: Any) -> Variant:
    """A variant that is somebody else's code."""
    return Variant(name=name, script=script, is_ours=False, **options)


NAIVE = peer("naive diffusers", "naive_diffusers.py")
DEVICE_MAP = peer("diffusers device_map", "device_map.py")
TUNED = peer("tuned diffusers", "tuned_diffusers.py")
