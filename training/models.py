"""The four parts of the model, built from the config, untrained."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from training.config import TextConfig, TransformerConfig, VaeConfig
from training.tokenizer import PAD, load_tokenizer

LATENT_CHANNELS = 16
SHIFT = 3.0


def build_vae(cfg: VaeConfig) -> AutoencoderKL:
    """8x autoencoder with 16 latent channels and no quant convolutions, as Z-Image's."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(cfg.channels), sample_size=128, scaling_factor=1.0, shift_factor=0.0,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=False, mid_block_add_attention=True,
    )  # fmt: skip


def build_text_encoder(cfg: TextConfig, vocab: int) -> Qwen3Model:
    """Qwen3 over `vocab` token ids.

    The pipeline reads `hidden_states[-2]`, so the last layer and the final norm stay unused.
    """
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=cfg.hidden, intermediate_size=cfg.intermediate, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        max_position_embeddings=1024, rope_theta=10000.0, tie_word_embeddings=True, use_cache=False,
        attention_bias=False, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    encoder = Qwen3Model(config)
    for parameter in encoder.layers[-1].parameters():  # zeros compress well in the wheel
        parameter.data.zero_()
    encoder.layers[-1].requires_grad_(False)
    encoder.norm.requires_grad_(False)
    nn.init.normal_(encoder.embed_tokens.weight, std=0.5)
    return encoder


def build_transformer(cfg: TransformerConfig, text: TextConfig) -> ZImageTransformer2DModel:
    """Z-Image's transformer; modulations and the output start at zero, so that every block starts as the identity."""
    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS, dim=cfg.dim, n_layers=cfg.layers, n_refiner_layers=cfg.refiners,
        n_heads=cfg.heads, n_kv_heads=cfg.heads, cap_feat_dim=text.hidden, axes_dims=list(cfg.axes_dims),
        axes_lens=[1024, 128, 128], rope_theta=256.0, t_scale=1000.0, qk_norm=True,
    )  # fmt: skip
    zeroed = [m.adaLN_modulation[-1] for m in model.modules() if hasattr(m, "adaLN_modulation")]
    for linear in (*zeroed, model.all_final_layer["2-1"].linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.normal_(model.cap_pad_token, std=0.02)
    model.x_pad_token.requires_grad_(False)  # 128x128 makes 64 image tokens, a multiple of 32: never used
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with Z-Image-Turbo's static shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False)


def load_vae(work: str | Path, device: torch.device | str) -> AutoencoderKL:
    """The trained VAE in fp32, frozen."""
    vae = AutoencoderKL.from_pretrained(Path(work) / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


__all__ = ["LATENT_CHANNELS", "PAD", "SHIFT", "build_scheduler", "build_text_encoder", "build_transformer", "build_vae",
           "count", "load_tokenizer", "load_vae"]  # fmt: skip
