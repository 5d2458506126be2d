"""A component's config.json from the shapes of its tensors, and the tensors that such a config asks for.

Shapes tell sizes. What they do not tell (rotary axes, epsilons, scaling factors) is Z-Image's own, or is taken from
the configs of ``base``, the checkpoint that fills in what a file lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

MAX_BLOCKS = 1000
"""Z-Image has 30 layers, Qwen3-4B 36."""
TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "norm_eps": 1e-5,
    "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "siglip_feat_dim": None,
}  # fmt: skip
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True,
}  # fmt: skip
SHIFTS = {"turbo": 3.0, "base": 6.0}
"""Variant -> the scheduler's shift. A file holds no scheduler, and its keys are those of either."""
ADALN_WIDTH, TIMESTEP_HIDDEN, FREQUENCIES = 256, 1024, 256


class UnknownShapes(Exception):
    """Shapes from which no config follows; the message says which."""


def config_of(component: str, shapes: Shapes, base: Mapping[str, Any] | None = None) -> Config:
    """config.json of a component whose tensors (published names) have these shapes. Raises UnknownShapes."""
    return _DERIVE[component](shapes, base or {})


def scheduler_config(variant: str) -> Config:
    """scheduler_config.json of a variant, a key of ``SHIFTS``."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": SHIFTS[variant],
    }


def expected_shapes(component: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of a component with this config."""
    return dict(_EXPECT[component](config))


def _transformer(shapes: Shapes, base: Mapping[str, Any]) -> Config:
    dim, patch = _shape(shapes, "all_x_embedder.2-1.weight", 2)
    _, cap_feat_dim = _shape(shapes, "cap_embedder.1.weight", 2)
    (head_dim,) = _shape(shapes, "noise_refiner.0.attention.norm_q.weight", 1)
    config = {
        **TRANSFORMER,
        **{name: base[name] for name in TRANSFORMER if name in base},
        "in_channels": patch // 4,
        "dim": dim,
        "n_layers": _blocks(shapes, "layers"),
        "n_refiner_layers": _blocks(shapes, "noise_refiner"),
        "n_heads": dim // max(head_dim, 1),
        "n_kv_heads": dim // max(head_dim, 1),
        "cap_feat_dim": cap_feat_dim,
    }
    axes = config["axes_dims"]
    if head_dim == 0 or dim % head_dim or sum(axes) != head_dim:
        raise UnknownShapes(f"attention heads of {head_dim} channels in {dim}: Z-Image's have {sum(axes)} ({axes})")
    return config


def _text_encoder(shapes: Shapes, base: Mapping[str, Any]) -> Config:
    vocab, hidden = _shape(shapes, "embed_tokens.weight", 2)
    (head_dim,) = _shape(shapes, "layers.0.self_attn.q_norm.weight", 1)
    heads = [_shape(shapes, f"layers.0.self_attn.{kind}_proj.weight", 2)[0] for kind in "qk"]
    if head_dim == 0 or any(rows % head_dim for rows in heads):
        raise UnknownShapes(f"attention heads of {head_dim} channels in {heads[0]} and {heads[1]}")
    known = {**TEXT_ENCODER, **{name: base[name] for name in (*TEXT_ENCODER, "rope_parameters") if name in base}}
    if "rope_parameters" in base:  # transformers 5 writes this instead of the two of version 4
        known = {name: value for name, value in known.items() if name not in ("rope_theta", "rope_scaling")}
    layers = _blocks(shapes, "layers")
    return {
        **known,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": _shape(shapes, "layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0] // head_dim,
        "num_key_value_heads": heads[1] // head_dim,
        "head_dim": head_dim,
    }


def _vae(shapes: Shapes, base: Mapping[str, Any]) -> Config:
    levels = _blocks(shapes, "decoder.up_blocks")
    channels = [_shape(shapes, f"decoder.up_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)][::-1]
    return {
        **VAE,
        **{name: base[name] for name in VAE if name in base},
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "layers_per_block": _blocks(shapes, "decoder.up_blocks.0.resnets") - 1,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UnknownShapes(f"{name} is missing")
    if len(shapes[name]) != dimensions:
        raise UnknownShapes(f"{name} has shape {list(shapes[name])}: need {dimensions} dimensions")
    return shapes[name]


def _blocks(shapes: Iterable[str], prefix: str) -> int:
    """How many blocks of a list the names speak of, those left out in between included."""
    found = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in shapes)
    numbers = [int(match[1][:9]) for match in found if match]
    if not numbers:
        raise UnknownShapes(f"{prefix}.0 is missing")
    if max(numbers) >= MAX_BLOCKS:
        raise UnknownShapes(f"{prefix}.{max(numbers)} is absurd")
    return max(numbers) + 1


def _transformer_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, width = config["dim"], min(config["dim"], ADALN_WIDTH)
    for side, frames in zip(config["all_patch_size"], config["all_f_patch_size"]):
        patch = side**2 * frames * config["in_channels"]
        yield from linear(f"all_x_embedder.{side}-{frames}", dim, patch)
        yield from linear(f"all_final_layer.{side}-{frames}.linear", patch, dim)
        yield from linear(f"all_final_layer.{side}-{frames}.adaLN_modulation.1", dim, width)
    yield from linear("t_embedder.mlp.0", TIMESTEP_HIDDEN, FREQUENCIES)
    yield from linear("t_embedder.mlp.2", width, TIMESTEP_HIDDEN)
    yield "cap_embedder.0.weight", (config["cap_feat_dim"],)
    yield from linear("cap_embedder.1", dim, config["cap_feat_dim"])
    yield "x_pad_token", (1, dim)
    yield "cap_pad_token", (1, dim)
    for i in range(config["n_refiner_layers"]):
        yield from transformer_block(f"noise_refiner.{i}", config, width)
        yield from transformer_block(f"context_refiner.{i}", config, None)
    for i in range(config["n_layers"]):
        yield from transformer_block(f"layers.{i}", config, width)


def transformer_block(name: str, config: Config, width: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a block; ``width``: features that its adaLN layer takes, None without one."""
    dim, hidden = config["dim"], int(config["dim"] / 3 * 8)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.attention.{part}.weight", (dim, dim)
    for part in ("norm_q", "norm_k") if config["qk_norm"] else ():
        yield f"{name}.attention.{part}.weight", (dim // config["n_heads"],)
    for part in ("w1", "w3"):
        yield f"{name}.feed_forward.{part}.weight", (hidden, dim)
    yield f"{name}.feed_forward.w2.weight", (dim, hidden)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{norm}.weight", (dim,)
    if width is not None:
        yield from linear(f"{name}.adaLN_modulation.0", 4 * dim, width)


def _text_encoder_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield "embed_tokens.weight", (config["vocab_size"], hidden)
    yield "norm.weight", (hidden,)
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"layers.{i}.{norm}.weight", (hidden,)
        for part, shape in (("q_proj", (query, hidden)), ("k_proj", (key, hidden)), ("v_proj", (key, hidden))):
            yield f"layers.{i}.self_attn.{part}.weight", shape
            if config["attention_bias"]:
                yield f"layers.{i}.self_attn.{part}.bias", shape[:1]
        yield f"layers.{i}.self_attn.o_proj.weight", (hidden, query)
        if config["attention_bias"]:
            yield f"layers.{i}.self_attn.o_proj.bias", (hidden,)
        for norm in ("q_norm", "k_norm"):
            yield f"layers.{i}.self_attn.{norm}.weight", (head,)
        for part in ("gate_proj", "up_proj"):
            yield f"layers.{i}.mlp.{part}.weight", (config["intermediate_size"], hidden)
        yield f"layers.{i}.mlp.down_proj.weight", (hidden, config["intermediate_size"])


def _vae_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, latent = list(config["block_out_channels"]), config["latent_channels"]
    yield from _conv("encoder.conv_in", channels[0], config["in_channels"], 3)
    yield from _vae_levels("encoder.down_blocks", channels, channels[0], config["layers_per_block"], "downsamplers")
    yield from _vae_ends("encoder", channels[-1], channels[-1], config)
    yield from _conv("encoder.conv_out", 2 * latent, channels[-1], 3)
    yield from _conv("decoder.conv_in", channels[-1], latent, 3)
    yield from _vae_ends("decoder", channels[-1], channels[0], config)
    above, layers = channels[::-1], config["layers_per_block"] + 1
    yield from _vae_levels("decoder.up_blocks", above, above[0], layers, "upsamplers")
    yield from _conv("decoder.conv_out", config["out_channels"], channels[0], 3)
    if config["use_quant_conv"]:
        yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config["use_post_quant_conv"]:
        yield from _conv("post_quant_conv", latent, latent, 1)


def _vae_levels(
    name: str, channels: list[int], before: int, layers: int, resize: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i, wide in enumerate(channels):
        for j in range(layers):
            yield from _resnet(f"{name}.{i}.resnets.{j}", before if j == 0 else wide, wide)
        if i < len(channels) - 1:
            yield from _conv(f"{name}.{i}.{resize}.0.conv", wide, wide, 3)
        before = wide


def _vae_ends(half: str, mid: int, out: int, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The middle block and the last norm of encoder or decoder."""
    for i in range(2):
        yield from _resnet(f"{half}.mid_block.resnets.{i}", mid, mid)
    if config["mid_block_add_attention"]:
        attention = f"{half}.mid_block.attentions.0"
        yield from _norm(f"{attention}.group_norm", mid)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from linear(f"{attention}.{part}", mid, mid)
    yield from _norm(f"{half}.conv_norm_out", out)


def _resnet(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", before)
    yield from _conv(f"{name}.conv1", after, before, 3)
    yield from _norm(f"{name}.norm2", after)
    yield from _conv(f"{name}.conv2", after, after, 3)
    if before != after:
        yield from _conv(f"{name}.conv_shortcut", after, before, 1)


def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of a linear layer's two tensors."""
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _conv(name: str, out: int, into: int, side: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, side, side)
    yield f"{name}.bias", (out,)


_DERIVE = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}
_EXPECT = {"transformer": _transformer_shapes, "text_encoder": _text_encoder_shapes, "vae": _vae_shapes}
