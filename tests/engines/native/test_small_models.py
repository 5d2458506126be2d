"""The models of diffusers' own Z-Image tests, made here with random weights: both engines draw the same picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import NANO
from tests.support.engines import PARAMS, create, picture
from zimage_runner.engines.auto import AutoEngine
from zimage_runner.engines.base import Device
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.errors import UserError
from zimage_runner.weights.find.layout import inspect

PIPELINE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "axes_dims": [8, 4, 4]}
"""Of diffusers' tests/pipelines/z_image."""
MODEL: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 1, "axes_dims": [8, 4, 4]}
"""Of diffusers' tests/models/transformers."""


def make(folder: Path, transformer: dict[str, Any]) -> Path:
    """A checkpoint as diffusers saves it: autoencoder of two blocks, scheduler with its defaults (shift 1)."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    encoder = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=15164, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3Model(encoder).save_pretrained(folder / "text_encoder")
    model = ZImageTransformer2DModel(
        in_channels=16, n_refiner_layers=1, n_kv_heads=transformer["n_heads"], cap_feat_dim=16,
        axes_lens=[256, 32, 32], **transformer,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias") and parameter.ndim == 2:  # diffusers leaves the padding tokens unset
                parameter.normal_(std=0.2)
    model.save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(32, 64),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        layers_per_block=1, latent_channels=16, norm_num_groups=32,
        sample_size=32, scaling_factor=0.3611, shift_factor=0.1159,
    ).save_pretrained(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    shutil.copytree(NANO / "tokenizer", folder / "tokenizer")
    shutil.copy(NANO / "model_index.json", folder)
    return folder


@pytest.mark.parametrize("transformer", [PIPELINE, MODEL], ids=["dim 32", "dim 16"])
def test_draws_what_diffusers_draws(tmp_path: Path, transformer: dict[str, Any]) -> None:
    path = make(tmp_path / "small", transformer)
    inspect(path)  # whole
    native, diffusers = (create(config(device=Device.cpu), path) for config in (NativeEngine, DiffusersEngine))
    assert (native.vae_scale_factor, native.model.description.shift) == (2, 1.0)
    for changes in (
        {},
        {"guidance_scale": 3.0, "negative_prompt": "blurry"},
        {"guidance_scale": 2.0, "negative_prompt": "a cat", "cfg_truncation": 0.7, "cfg_normalization": 1.0},
    ):
        params = replace(PARAMS, height=32, width=48, **changes)
        expected, got = picture(diffusers, params), picture(native, params)
        assert got.shape == (1, 32, 48, 3)
        assert expected.std() > 10  # not one colour, in which any two models agree
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_auto_takes_diffusers_only_for_what_native_does_not_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    path = make(tmp_path / "small", PIPELINE)
    engine = create(AutoEngine(device=Device.cpu), path)
    assert engine.name == "native"
    scheduler = path / "scheduler/scheduler_config.json"
    content = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.write_text(json.dumps(content | {"use_karras_sigmas": True}), encoding="utf-8")
    inspect(path)  # whole all the same
    assert create(AutoEngine(device=Device.cpu), path).name == "diffusers"

    scheduler.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(DiffusersEngine, "create", lambda *_: pytest.fail("diffusers was asked"))
    (path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        create(AutoEngine(device=Device.cpu), path)
    with pytest.raises(UserError, match=r"^engine\.device=cuda but "):
        create(AutoEngine(device=Device.cuda), path)
