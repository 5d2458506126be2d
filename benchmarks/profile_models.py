"""Z-Image's models with random weights in their place, clocks, and the sections of profile_native.py and
profile_precision.py."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimage_runner.engines.native.assembly import Description
from zimage_runner.engines.native.loading import (
    FLOAT32,
    TRANSFORMER_RULES,
    TRANSFORMER_UNUSED,
    VAE_RULES,
    assign,
    in_place,
    published_names,
)
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.text_encoder import TextEncoder, TextEncoderConfig
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.engines.native.transformer import Transformer, TransformerConfig
from zimage_runner.engines.native.vae_decoder import VaeConfig, VaeDecoder

NANO = Path(__file__).resolve().parent.parent / "zimage_runner" / "assets" / "zimage_nano"

TRANSFORMER = {
    "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
}  # fmt: skip
TEXT_ENCODER = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
VAE = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    "mid_block_add_attention": True, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def configs(tiny: bool) -> dict[str, dict[str, Any]]:
    """config.json of the three models: the published ones, or the embedded model's."""
    full = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}
    return (
        {name: json.loads((NANO / name / "config.json").read_text(encoding="utf-8")) for name in full} if tiny else full
    )


def fill(module: nn.Module, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Random weights: normal, std 1/sqrt(fan-in); norms near 1; what modulates, small. Never zeros: they run faster."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(generator=generator)
        if "norm" in name and not name.endswith("bias"):
            value.mul_(0.1).add_(1)
        elif "modulation" in name:
            value.mul_(0.3 / math.sqrt(parameter.shape[-1]))
        elif parameter.ndim < 2:
            value.mul_(0.02)
        elif parameter.ndim == 4:
            value = value.div_(math.sqrt(parameter[0].numel())).contiguous(memory_format=torch.channels_last)
        else:
            value.div_(math.sqrt(parameter.shape[-1]))
        owner, _, leaf = name.rpartition(".")
        kind = torch.float32 if FLOAT32.match(name) else dtype
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.to(kind), requires_grad=False))


def build(tiny: bool, options: Options) -> NativeModel:
    """A NativeModel with random weights."""
    published = configs(tiny)
    description = Description(
        transformer=TransformerConfig.from_published(published["transformer"]),
        text_encoder=TextEncoderConfig.from_published(published["text_encoder"]),
        vae=VaeConfig.from_published(published["vae"]),
        shift=3.0,
    )
    model = NativeModel(description, CaptionTokenizer(NANO / "tokenizer"), options)
    with torch.device("meta"):
        model.transformer = Transformer(description.transformer, model.ops, model.attention.attend)
        model.text_encoder = TextEncoder(description.text_encoder)
        model.vae = VaeDecoder(description.vae, model.ops)
    for module in (model.transformer, model.text_encoder, model.vae):
        fill(module, options.device, options.dtype)
    return model


def variant(model: NativeModel, **changes: Any) -> NativeModel:
    """The same weights run with other options; rounded, moved or streamed where those say so."""
    options = replace(model.options, **changes)
    other = NativeModel(model.description, model.tokenizer, options)
    with torch.device("meta"):
        attend = other.attention
        module = Transformer(
            model.description.transformer, other.ops, attend.attend, options.arithmetic, attend.attend_fp8
        )
    place = module.stream_blocks(other.device) if options.streamed else in_place
    kind = (options.device, options.dtype, "transformer")
    state = model.transformer.state_dict()
    other.transformer = assign(module, state, TRANSFORMER_RULES, TRANSFORMER_UNUSED, *kind, place=place)
    other.vae = model.vae
    return other


def published_state(module: nn.Module, rules: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The module's tensors under their published names, as views."""
    state = {}
    for name, tensor in module.state_dict().items():
        sources = published_names(name, rules)
        parts = [tensor] if len(sources) == 1 else tensor.chunk(len(sources))
        for source, part in zip(sources, parts):
            state[source] = (part.squeeze(0) if name.endswith("norm_qk") else part).to(dtype)
    return state


def diffusers_models(model: NativeModel, tiny: bool) -> tuple[Any, Any]:
    """diffusers' transformer and VAE on the same weights. Raises ImportError without diffusers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    published, dtype = configs(tiny), model.options.dtype
    with torch.device("meta"):
        transformer: Any = ZImageTransformer2DModel.from_config(published["transformer"])
        vae: Any = AutoencoderKL.from_config(published["vae"])
    transformer.load_state_dict(published_state(model.transformer, TRANSFORMER_RULES, dtype), assign=True)
    vae.load_state_dict(published_state(model.vae, VAE_RULES, dtype), strict=False, assign=True)
    del vae.encoder
    return transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False)


class Clock:
    """Median milliseconds of a call, by events on the GPU and by the wall clock on the CPU."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, call: Callable[[], Any], repeats: int | None = None, warm: int = 2) -> float:
        for _ in range(warm):
            call()
        times = [self._once(call) for _ in range(repeats or self.repeats)]
        return sorted(times)[len(times) // 2]

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def noise(batch: int, size: int) -> torch.Tensor:
    """Latent noise for square pictures."""
    return torch.randn(batch, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(2))


def measure(profile: Any, sections: Sequence[str], about: dict[str, Any], path: Path) -> None:
    """Print what each section, a method of ``profile``, returns, or its error; store it in ``about`` and in a file."""
    began = time.perf_counter()
    for name in sections:
        try:
            with torch.inference_mode():
                about[name] = getattr(profile, name)()
        except Exception:
            about[name] = {"failed": traceback.format_exc().splitlines()[-12:]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"\n{name} (at {time.perf_counter() - began:.1f} s)")
        for key, value in about[name].items():
            print(f"  {key}: {rounded(value)}", flush=True)
        path.write_text(json.dumps(about, indent=1), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Four significant digits for the eye; the file keeps all."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return "".join(f"\n    {ms:9.2f} ms {count:6d} x {name}" for name, count, ms in value)
    if isinstance(value, list):
        return "".join(f"\n    {item}" for item in value)
    return value
