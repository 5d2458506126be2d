"""Pictures from pictures are diffusers': its encoder, img2img and inpainting, in float32 with the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support import NANO
from tests.support.reference import TOLERANCE, Reference, captions, difference
from zimage_runner.engines.native.assembly import load_vae_encoder
from zimage_runner.engines.native.model import NativeModel
from zimage_runner.engines.native.sampler import Guidance, Start, make_schedule
from zimage_runner.engines.request import draw_noises, latent_mask

SEED = 11


@pytest.fixture(scope="module")
def encoding(native: NativeModel) -> NativeModel:
    load_vae_encoder(native, NANO)
    return native


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, as pictures have them, with some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 9 + 2 * phase) + np.cos(columns / 7 - phase) for phase in range(3)]
    picture = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 5, (height, width, 3))
    return picture.clip(0, 255).astype(np.uint8)


def pipeline(reference: Reference, name: str) -> Any:
    import diffusers

    pipe = getattr(diffusers, name)(**reference.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def started(model: NativeModel, picture: np.ndarray, **options: Any) -> tuple[torch.Tensor, Start]:
    """The noise and the start of an item with SEED, as a session makes them."""
    posterior = model.encode_picture(torch.from_numpy(picture))
    channels, height, width = posterior.mean.shape
    first, noise = draw_noises(2, [SEED], channels, height, width)
    return noise, Start(latents=posterior.sample(first), **options)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (48, 80)])
def test_the_encoder(encoding: NativeModel, reference: Reference, height: int, width: int) -> None:
    picture = pixels(height, width)
    vae = reference.pipe.vae
    with torch.inference_mode():
        theirs = vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    ours = encoding.encode_picture(torch.from_numpy(picture))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert difference(ours.mean, (theirs.mean[0] - shift) * scale) <= TOLERANCE
    assert difference(ours.std, theirs.std[0] * scale) <= TOLERANCE


@pytest.mark.parametrize(
    ("strength", "options"),
    [(0.6, {}), (0.3, {}), (0.05, {}), (0.6, {"scale": 3.0, "truncation": 0.7})],
    ids=str,
)
def test_img2img(encoding: NativeModel, reference: Reference, strength: float, options: dict[str, float]) -> None:
    picture, embeds, negative = pixels(48, 80), captions(20), captions(9, seed=1)
    guidance = Guidance(**options)
    theirs = pipeline(reference, "ZImageImg2ImgPipeline")(
        image=torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, strength=strength, prompt_embeds=list(embeds),
        negative_prompt_embeds=list(negative), num_inference_steps=8, guidance_scale=guidance.scale,
        cfg_truncation=guidance.truncation, generator=torch.Generator().manual_seed(SEED), output_type="latent",
    ).images  # fmt: skip
    noise, start = started(encoding, picture, strength=strength)
    ours = encoding.denoise(embeds, noise, 8, guidance, negative if guidance.scale else None, start)
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting(encoding: NativeModel, reference: Reference, strength: float) -> None:
    picture, embeds = pixels(64, 64), captions(20)
    mask = np.zeros((64, 64), np.float32)
    mask[16:40, 8:48] = 1  # on the grid of latents: elsewhere ours is drawn wherever a pixel is, theirs by one pixel
    theirs = pipeline(reference, "ZImageInpaintPipeline")(
        image=torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, mask_image=torch.from_numpy(mask)[None, None],
        strength=strength, prompt_embeds=list(embeds), num_inference_steps=8, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(SEED), output_type="latent",
    ).images  # fmt: skip
    noise, start = started(encoding, picture, strength=strength, mask=latent_mask(mask, 8)[None])
    assert difference(encoding.denoise(embeds, noise, 8, None, None, start), theirs) <= TOLERANCE


def test_steps_after_strength_are_the_end_of_a_longer_schedule() -> None:
    whole, part = make_schedule(16, 3.0), make_schedule(8, 3.0, 0.5, exact=True)
    assert torch.allclose(part.sigmas, whole.sigmas[8:], atol=1e-6)
    assert len(make_schedule(8, 3.0, 0.3).times) == 3
    assert len(make_schedule(8, 3.0, 0.3, exact=True).times) == 8


def test_a_batch_draws_what_each_draws_alone(encoding: NativeModel) -> None:
    starts = [started(encoding, pixels(48, 80, seed), strength=0.5) for seed in (0, 1)]
    embeds = captions(20, 25)
    noise = torch.cat([one for one, _ in starts])
    both = Start(latents=torch.stack([start.latents for _, start in starts])[:, 0], strength=0.5)
    together = encoding.denoise(embeds, noise, 4, None, None, both)
    alone = [encoding.denoise(embeds[n : n + 1], z, 4, None, None, start) for n, (z, start) in enumerate(starts)]
    assert difference(together, torch.cat(alone)) <= TOLERANCE
