"""The three engine calls put together for one picture: warm-up and reproduction use it."""

from __future__ import annotations

from zimage_runner.engines.base import DenoiseRequest, Engine, PendingImages
from zimage_runner.engines.noise import draw_noise
from zimage_runner.sampling import SamplingParams


def generate_one(engine: Engine, text: str, params: SamplingParams, seed: int) -> PendingImages:
    """Generate the picture of one prompt and seed through the same calls as a run."""
    texts = [text, params.negative_prompt] if params.uses_guidance else [text]
    embeds = engine.encode(texts, params.max_sequence_length)
    scale = engine.vae_scale_factor
    noise = draw_noise([seed], engine.latent_channels, params.height // scale, params.width // scale)
    request = DenoiseRequest(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:] if params.uses_guidance else None,
        noise=noise,
        params=params,
    )
    return engine.decode(engine.denoise(request))
