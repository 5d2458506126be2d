"""Engines of the embedded model, and one picture drawn by the three calls of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support import NANO
from zimage_runner.compile import Compile
from zimage_runner.engines.base import Engine, EngineConfig
from zimage_runner.engines.request import DenoiseRequest, LoadRequest, draw_noises
from zimage_runner.memory.policies import Memory, Resident
from zimage_runner.model import Model, Source
from zimage_runner.sampling import SamplingParams
from zimage_runner.weights.find.checkpoint import Checkpoint

PARAMS = SamplingParams(
    height=128, width=128, num_inference_steps=4, guidance_scale=0.0, negative_prompt="",
    max_sequence_length=512, cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip
MODEL = Model(name="nano", source=Source.local, path=str(NANO))


def create(config: EngineConfig, path: Path = NANO, memory: Memory | None = None) -> Any:
    checkpoint = Checkpoint(path=path, revision="test", digest="test")
    request = LoadRequest(checkpoint=checkpoint, model=MODEL, memory=memory or Resident(), compile=Compile())
    return config.create(request)


def picture(engine: Engine, params: SamplingParams = PARAMS) -> np.ndarray:
    """What the three calls of an engine draw of one prompt and seed."""
    texts = ["a red apple", *([params.negative_prompt] if params.uses_guidance else [])]
    embeds = engine.encode(texts, params.max_sequence_length)
    sides = (params.height // engine.vae_scale_factor, params.width // engine.vae_scale_factor)
    request = DenoiseRequest(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:] or None,
        noise=draw_noises(1, [7], engine.latent_channels, *sides)[0],
        params=params,
    )
    return engine.decode(engine.denoise(request)).wait()
