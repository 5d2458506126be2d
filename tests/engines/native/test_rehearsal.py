"""The decoder is planned for between the first forwards, once a size, and no picture changes by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import NANO
from tests.support.reference import captions, noise
from zimage_runner.engines.native import engine as engine_module
from zimage_runner.engines.native import model as model_module
from zimage_runner.engines.native import rehearsal
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.kernels import torch_ops
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.vae_decoder import VaeDecoder
from zimage_runner.memory.policies import Resident, Staged

STEPS = 8


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> NativeModel:
    monkeypatch.setattr(model_module, "RECORDED_TOKENS", 4)
    return load_model(NANO, Options(rehearse_decoder=True))


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuDNN would plan for, in the order of the calls."""
    calls: list[tuple[Any, ...]] = []
    convolve = F.conv2d

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append((x.shape, x.stride(), x.dtype, weight.shape, weight.stride()))
        return convolve(x, weight, *rest, **options)

    monkeypatch.setattr(F, "conv2d", conv2d)
    return calls


def denoise(model: NativeModel, side: int = 64, steps: int = STEPS, batch: int = 1) -> torch.Tensor:
    return model.denoise(captions(*[9] * batch), noise(batch, side, side), steps)


def test_everything_is_planned_for_and_the_picture_is_the_same(model, native, convolutions):
    latents = denoise(model)
    rehearsed = set(convolutions)
    assert torch.equal(latents, denoise(native))
    convolutions.clear()
    picture = model.decode(latents).wait()
    assert convolutions
    assert set(convolutions) <= rehearsed
    assert (picture == native.decode(latents).wait()).all()


def test_once_a_size(model, convolutions):
    denoise(model)
    assert convolutions
    convolutions.clear()
    denoise(model)
    denoise(model, batch=2)
    assert convolutions == []  # decoded one by one: a batch is no other size
    denoise(model, side=48)
    assert convolutions


def test_not_for_a_size_that_was_decoded(model, convolutions):
    model.decode(noise(1, 64, 64))
    convolutions.clear()
    denoise(model)
    assert convolutions == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_not_when_the_decoder_comes_next(model, convolutions, steps):
    denoise(model, steps=steps)
    assert convolutions == []


def test_not_where_forwards_are_short_or_nobody_asked(model, native, convolutions, monkeypatch):
    denoise(native)
    denoise(model, side=32)  # 4 image tokens
    vae = model.vae
    del model.vae
    denoise(model)  # the decoder is not in memory
    assert convolutions == []
    model.vae = vae
    denoise(model)
    assert convolutions


def test_a_few_layers_after_each_forward_but_the_last(model, monkeypatch):
    events: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (events.append(name), call(*args, **options))[1]

    monkeypatch.setattr(model.transformer, "forward", noted("forward", model.transformer.forward))
    for layer in {id(layer): layer for layer in model.vae.layers()}.values():
        monkeypatch.setattr(layer, "forward", noted("layer", layer.forward))
    denoise(model)
    told = "".join(event[0] for event in events)
    assert told.startswith("f" * (rehearsal.START + 1) + "l")
    assert told.endswith("f")
    assert max(map(len, told.split("f"))) <= rehearsal.LAYERS


def test_the_published_decoder_is_rehearsed_within_eight_steps(native):
    config = replace(native.description.vae, block_out_channels=(128, 256, 512, 512), norm_num_groups=32)
    with torch.device("meta"):
        vae = VaeDecoder(config, torch_ops)
    with torch.inference_mode():
        layers = sum(1 for _ in vae.rehearse(128, 128))
    copies = 1
    assert layers + copies <= rehearsal.LAYERS * (STEPS - 1 - rehearsal.START)


def test_too_little_memory_ends_the_rehearsal_alone(model, native, monkeypatch):
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.vae.conv_in, "forward", full)
    assert torch.equal(denoise(model), denoise(native))


@pytest.mark.parametrize(
    ("device", "staged", "wanted"), [("cpu", False, False), ("cuda", False, True), ("cuda", True, False)]
)
def test_which_engines_rehearse(monkeypatch, device, staged, wanted):
    class Adapter(NativeEngineAdapter):
        def __init__(self, weights: Any, options: Options, *rest: Any) -> None:
            self.options = options

    monkeypatch.setattr(engine_module, "choose_device", lambda config: config.device)
    weights: Any = SimpleNamespace(settle=lambda *args: None, free_bytes=None)
    memory = Staged() if staged else Resident()
    model = SimpleNamespace(dtype="bfloat16", controlnet_convention=None)
    checkpoint = SimpleNamespace(path=None, controlnet=None)
    request: Any = SimpleNamespace(model=model, memory=memory, encodes=True, controlled=False, checkpoint=checkpoint)
    monkeypatch.setattr(engine_module, "choose_dtype", lambda dtype, device: dtype)
    engine: Any = Adapter.load(NativeEngine(device=device), weights, request)
    assert engine.options.rehearse_decoder == wanted
