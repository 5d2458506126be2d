"""What is compared: peers as scripts of their own, and this runner through its command line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zimage_runner.config.schema import Composed, RunConfig

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "prompts.txt"
PICTURE = HERE.parent / "conf" / "pictures" / "cat.png"


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
    """Hydra overrides (and flags) of this runner; None for a peer. ``{picture}`` stands for a picture's path,
    ``{beside}`` for the folder that the model lies in."""
    script: str | None = None
    """A peer's script below ``peers/``."""
    images: int | None = None
    """Pictures, where it should draw more or fewer than the scenario's others."""
    rounds: int | None = None
    """Processes at most, for variants that are slow."""
    caches: tuple[str, ...] = ("warm", "dropped")
    """States of the page cache under which it takes part."""
    env: dict[str, str] = field(default_factory=dict)
    keeps: dict[str, str] = field(default_factory=dict)
    """Option of this runner (of a peer: environment variable) -> folder that lasts as long as the scenario; variants
    that name the same folder share it: prompt embeddings and compiled code of an earlier run."""
    starts_empty: bool = False
    """Its folders are emptied before each process: as on the first run on a machine."""
    primed: bool = False
    """Run once, uncounted, when its folders are empty."""

    def command(self, work: Work, out: Path, kept: Path | None = None) -> list[str]:
        """The command line; pictures and readings go below ``out``, what outlives the process below ``kept``."""
        if self.script is not None:
            return [
                sys.executable, str(HERE / "peers" / self.script), "--model", str(work.model), "--out", str(out),
                "--prompts", str(PROMPTS), "--images", str(work.images), "--size", str(work.size),
                "--steps", str(work.steps), "--device", work.device,
            ]  # fmt: skip
        prompts = len(PROMPTS.read_text(encoding="utf-8").splitlines())
        keeps = [f"{option}={folder}" for option, folder in zip(self.keeps, self.folders(kept or out))]
        seeds = max(1, -(-work.images // prompts))
        flags = [override for override in self.overrides or () if override.startswith("-")]
        overrides = [
            override.replace("{picture}", str(PICTURE)).replace("{beside}", str(work.model.parent))
            for override in self.overrides or () if override not in flags
        ]  # fmt: skip
        return [
            sys.executable, "-m", "zimage_runner", *flags,
            "model=local", f"model.path={work.model}", "name=bench",
            f"output.root={out / 'runs'}", "prompts=text_file", f"prompts.path={PROMPTS}",
            f"prompts.limit={min(work.images, prompts)}", f"seeds='0-{seeds - 1}'", f"engine.device={work.device}",
            f"sampling.height={work.size}", f"sampling.width={work.size}",
            f"sampling.num_inference_steps={work.steps}", *overrides, *keeps,
        ]  # fmt: skip

    def folders(self, kept: Path) -> list[Path]:
        """Its folders that outlive the process."""
        return [kept / name for name in self.keeps.values()]

    def environment(self, kept: Path | None = None) -> dict[str, str]:
        """The child's environment: this checkout importable, no progress bars, the variant's own settings.

        ``kept``: where the folders of ``keeps`` are.
        """
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        # GPUs in the driver's order, so that an index in CUDA_VISIBLE_DEVICES means the GPU that is read.
        own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.script is not None and kept is not None:
            own |= {name: str(folder) for name, folder in zip(self.keeps, self.folders(kept))}
        return os.environ | own | self.env

    @property
    def is_ours(self) -> bool:
        """False for somebody else's code."""
        return self.script is None


def composed(*words: str) -> RunConfig:
    """The config that these words of a command line make, for measurements below it."""
    from zimage_runner.cli.main import main

    jobs: list[Composed] = []
    if main(words, take=lambda job: jobs.append(job) or 0):
        sys.exit(f"nothing can be measured with {' '.join(words)}")
    return jobs[0].config


def ours(name: str, *overrides: str, **options: Any) -> Variant:
    """A variant of this runner."""
    return Variant(name=name, overrides=overrides, **options)


def peer(name: str, script: str, **options: Any) -> Variant:
    """A variant that is somebody else's code."""
    return Variant(name=name, script=script, **options)


NAIVE = peer("naive diffusers", "naive_diffusers.py")
NAIVE_BYTECODE = peer(
    "naive diffusers, bytecode kept",
    "naive_diffusers.py",
    env={"PYTHONDONTWRITEBYTECODE": ""},
    keeps={"PYTHONPYCACHEPREFIX": "bytecode"},
    primed=True,
)
"""The same where Python keeps the bytecode of its imports, as most installations do: the fair baseline of a start."""
DEVICE_MAP = peer("diffusers device_map", "device_map.py")
TUNED = peer("tuned diffusers", "tuned_diffusers.py")
