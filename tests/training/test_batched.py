"""The batched training forwards compute what the diffusers and transformers modules compute."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportArgumentType=false
import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from training.batched import encode_text, rope_tables, sample, sigmas, velocity
from training.config import load_config
from training.models import build_scheduler, build_text_encoder, build_transformer

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


def test_sigmas_are_the_schedulers() -> None:
    for steps in (4, 8):
        scheduler = build_scheduler()
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), device="cpu")
        assert torch.allclose(sigmas(steps), scheduler.sigmas, atol=1e-6)


def test_sampling_is_deterministic() -> None:
    model, encoder = build_transformer(CFG.transformer, CFG.text), build_text_encoder(CFG.text, CFG.text.vocab)
    ids, noise = torch.randint(3, 100, (1, 32)), torch.randn(1, 16, 16, 16)
    assert torch.equal(sample(model, encoder, ids, noise, 2), sample(model, encoder, ids, noise, 2))
