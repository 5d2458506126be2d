"""diffusers' pipeline, which the native engine is held against, and inputs for both."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

STEPS = 8
TOLERANCE = 1e-4
"""Largest difference of latents over STEPS forwards in float32."""


class Reference:
    """diffusers' pipeline in the engine's three calls."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

            self.pipe: Any = ZImagePipeline.from_pretrained(str(path), torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def encode(self, texts: list[str], max_sequence_length: int = 512) -> list[torch.Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return embeds

    def denoise(
        self, embeds: list[torch.Tensor], noise: torch.Tensor, steps: int = STEPS, **options: Any
    ) -> torch.Tensor:
        options.setdefault("guidance_scale", 0.0)
        height, width = (8 * side for side in noise.shape[-2:])
        return self.pipe(
            prompt_embeds=list(embeds), latents=noise, height=height, width=width,
            num_inference_steps=steps, output_type="latent", **options,
        ).images  # fmt: skip

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


def noise(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Latent noise for pictures of height x width pixels."""
    shape = (batch, 16, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def captions(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Caption features of the given numbers of tokens, at about the scale that the text encoder gives."""
    generator = torch.Generator().manual_seed(seed)
    return [130 * torch.randn(length, 192, generator=generator) for length in lengths]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN if either holds one."""
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()
