"""The batched training forwards compute what the diffusers and transformers modules compute."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportArgumentType=false
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from tests.support import NANO
from tests.support.controlnets import TRANSFORMER, make_controlnet, write_controlnet
from training.batched import encode_text, rope_tables, sample, sigmas, velocity
from training.config import load_config
from training.models import build_scheduler, build_text_encoder, build_transformer
from zimage_runner.engines.native.assembly import load_controlnet, load_model
from zimage_runner.engines.native.model import Control, Options
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.controlnet import find_controlnet

CFG = load_config()


def randomise(module: torch.nn.Module) -> None:
    """Weights that make every path matter: zero-initialised modulations would hide mistakes."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        mean, std = (0.0, 0.05) if parameter.dim() > 1 else (0.5, 0.1)
        torch.nn.init.normal_(parameter, mean, std)


def test_text_encoder_equals_qwen3() -> None:
    encoder = build_text_encoder(CFG.text, CFG.text.vocab)
    randomise(encoder)
    ids = torch.randint(3, CFG.text.vocab, (2, 20))
    expected = encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(encode_text(encoder, ids), expected, atol=1e-4)


def test_padding_on_the_right_changes_no_real_token() -> None:
    encoder = build_text_encoder(CFG.text, CFG.text.vocab)
    ids = torch.randint(3, CFG.text.vocab, (1, 12))
    padded = torch.cat([ids, torch.zeros(1, 20, dtype=torch.long)], 1)
    assert torch.allclose(encode_text(encoder, padded)[:, :12], encode_text(encoder, ids), atol=1e-5)


def test_velocity_equals_diffusers() -> None:
    model = build_transformer(CFG.transformer, CFG.text)
    randomise(model)
    z, time = torch.randn(2, 16, 16, 16), torch.tensor([0.2, 0.7])
    captions = [torch.randn(20, CFG.text.hidden), torch.randn(11, CFG.text.hidden)]
    expected = torch.stack(model([x.unsqueeze(1) for x in z], time, captions, return_dict=False)[0]).squeeze(2)
    dense, real = torch.zeros(2, 32, CFG.text.hidden), torch.zeros(2, 32, dtype=torch.bool)
    for row, caption in enumerate(captions):
        dense[row, : len(caption)], real[row, : len(caption)] = caption, True
    got = velocity(model, z, time, dense, real, rope_tables(model, 32, 8, 8, "cpu"))
    assert expected.abs().max() > 0.1
    assert torch.allclose(got, expected, atol=2e-4)


def test_a_steered_velocity_equals_the_native_engines(tmp_path: Path) -> None:
    model = load_model(NANO, Options())
    config = Model(
        name="nano", source=Source.embedded, controlnet=str(write_controlnet(tmp_path / "n.safetensors", "2.0"))
    )
    found = find_controlnet(config, TRANSFORMER)
    assert found is not None
    load_controlnet(model, found)
    embeds, z = model.encode(["a red apple"], 512), torch.randn(1, 16, 16, 16)
    condition = torch.randn(1, 33, 16, 16)
    ours = model.denoise(embeds, z, 1, control=Control(condition=condition, scales=[1.0])) - z  # one step, from noise
    transformer = ZImageTransformer2DModel.from_pretrained(NANO, subfolder="transformer", torch_dtype=torch.float32)
    dense, real = torch.zeros(1, 32, embeds[0].shape[1]), torch.zeros(1, 32, dtype=torch.bool)
    dense[0, : len(embeds[0])], real[0, : len(embeds[0])] = embeds[0], True
    given = (transformer, z, torch.zeros(1), dense, real, rope_tables(transformer, 32, 8, 8, "cpu"))
    with torch.inference_mode():
        steered, plain = velocity(*given, make_controlnet("2.0"), condition), velocity(*given)
    assert (steered - plain).abs().max() > 0.1
    assert torch.allclose(steered, ours, atol=2e-4)


def test_sigmas_are_the_schedulers() -> None:
    for steps in (4, 8):
        scheduler = build_scheduler()
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), device="cpu")
        assert torch.allclose(sigmas(steps), scheduler.sigmas, atol=1e-6)


def test_sampling_is_deterministic() -> None:
    model, encoder = build_transformer(CFG.transformer, CFG.text), build_text_encoder(CFG.text, CFG.text.vocab)
    ids, noise = torch.randint(3, 100, (1, 32)), torch.randn(1, 16, 16, 16)
    assert torch.equal(sample(model, encoder, ids, noise, 2), sample(model, encoder, ids, noise, 2))
