"""Both engines: a batch of n gives the latents of n batches of one, and both count forwards alike."""

from __future__ import annotations

import pytest
import torch

from tests.support import NANO
from zimage_runner.compile import NoCompile
from zimage_runner.engines.base import Engine
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.request import DenoiseRequest, LoadRequest, draw_noises
from zimage_runner.memory.policies import Resident
from zimage_runner.model import Model, Source
from zimage_runner.sampling import SamplingParams
from zimage_runner.weights.find.checkpoint import Checkpoint

CAPTIONS = ["a red apple", "一只熊猫", "a small robot toy"]
SEEDS = [1, 2, 3]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    request = LoadRequest(
        checkpoint=Checkpoint(path=NANO, revision="", digest=""),
        model=Model(name="zimage_nano", source=Source.embedded),
        memory=Resident(),
        compile=NoCompile(),
    )
    return {"diffusers": DiffusersEngine().create(request), "native": NativeEngine().create(request)}


def request(engine: Engine, rows: slice, guidance: float, steps: int = 3) -> DenoiseRequest:
    params = SamplingParams(
        height=64, width=64, num_inference_steps=steps, guidance_scale=guidance, negative_prompt="",
        max_sequence_length=512, cfg_normalization=0.0, cfg_truncation=1.0,
    )  # fmt: skip
    captions = CAPTIONS[rows]
    return DenoiseRequest(
        prompt_embeds=engine.encode(captions, 512),
        negative_prompt_embeds=engine.encode([""] * len(captions), 512) if guidance else None,
        noise=draw_noises(1, SEEDS[rows], engine.latent_channels, 8, 8)[0],
        params=params,
    )


@pytest.mark.parametrize("name", ["diffusers", "native"])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_batch_equals_its_singles(engines: dict[str, Engine], name: str, guidance: float) -> None:
    engine = engines[name]
    together = engine.denoise(request(engine, slice(0, 3), guidance))
    for row in range(3):
        alone = engine.denoise(request(engine, slice(row, row + 1), guidance))
        assert (together[row] - alone[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 8, 9])
def test_steps_are_transformer_forwards(engines: dict[str, Engine], steps: int) -> None:
    engine = engines["diffusers"]
    calls = []
    hook = engine.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore[reportAttributeAccessIssue]
    latents = engine.denoise(request(engine, slice(0, 1), 0.0, steps))
    hook.remove()
    assert len(calls) == steps
    assert latents.dtype == torch.float32
