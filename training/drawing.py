"""A checkpoint that draws prompts, for evaluation: through the runner's native engine, or through plain diffusers."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.models import LATENT_CHANNELS

SIDE = 128
Draw = Callable[[list[str], list[int], int], Tensor]
"""(prompts, seeds, forwards) -> pictures [B, 3, 128, 128] in [-1, 1] on the CPU; a generator each, no guidance."""


def open_native(model: str, device: str, dtype: torch.dtype) -> Draw:
    """Draw with engine=native: the default, as it is faster and computes the same."""
    from zimage_runner.engines.native.assembly import load_model
    from zimage_runner.engines.native.model import Options

    native = load_model(Path(model), Options(device=device, dtype=dtype))
    latent_side = SIDE // 8

    def draw(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        shape = (LATENT_CHANNELS, latent_side, latent_side)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        latents = native.denoise(native.encode(prompts, 512), noise, steps)
        pixels = torch.from_numpy(native.decode(latents).wait())
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    return draw


def open_diffusers(model: str, device: str, dtype: torch.dtype) -> Draw:
    """Draw with `ZImagePipeline`, nothing of this project between."""
    from diffusers import ZImagePipeline

    pipe: Any = ZImagePipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        out = pipe(
            list(prompts), height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=0.0, output_type="pt",
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        )  # fmt: skip
        return out.images.float().cpu() * 2 - 1

    return draw


OPENERS: dict[str, Callable[[str, str, torch.dtype], Draw]] = {"native": open_native, "diffusers": open_diffusers}


def in_batches(draw: Draw, prompts: list[str], seeds: list[int], steps: int, batch: int) -> Tensor:
    """Draw `batch` at a time."""
    starts = range(0, len(prompts), batch)
    return torch.cat([draw(prompts[k : k + batch], seeds[k : k + batch], steps) for k in starts])
