"""Weights of a miniature Z-Image, known to the last bit, written in every layout that users bring.

The writers are the definition of the layouts (../docs/formats.md), independent of the readers under test: names are
made block by block here, and quantisation encodes what the readers decode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
FEATURES = 256


def transformer_shapes(dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Published name -> shape: two layers, one refiner block each; the feed-forward is 8/3 as wide as ``dim``."""
    shapes: dict[str, tuple[int, ...]] = {
        "all_x_embedder.2-1.weight": (dim, 64),
        "all_x_embedder.2-1.bias": (dim,),
        "all_final_layer.2-1.linear.weight": (64, dim),
        "all_final_layer.2-1.linear.bias": (64,),
        "all_final_layer.2-1.adaLN_modulation.1.weight": (dim, 256),
        "all_final_layer.2-1.adaLN_modulation.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (256, 1024),
        "t_embedder.mlp.2.bias": (256,),
        "cap_embedder.0.weight": (FEATURES,),
        "cap_embedder.1.weight": (dim, FEATURES),
        "cap_embedder.1.bias": (dim,),
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
    }
    for block in BLOCKS:
        shapes |= {f"{block}.attention.{part}.weight": (dim, dim) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        shapes |= {f"{block}.attention.{part}.weight": (dim // heads,) for part in ("norm_q", "norm_k")}
        shapes |= {f"{block}.feed_forward.{part}.weight": (dim * 8 // 3, dim) for part in ("w1", "w3")}
        shapes[f"{block}.feed_forward.w2.weight"] = (dim, dim * 8 // 3)
        norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        shapes |= {f"{block}.{norm}.weight": (dim,) for norm in norms}
        if block != "context_refiner.0":
            shapes |= {
                f"{block}.adaLN_modulation.0.weight": (4 * dim, 256),
                f"{block}.adaLN_modulation.0.bias": (4 * dim,),
            }
    return shapes


MINIATURE = transformer_shapes(768, 6)
"""Keeps every rule of the full size: heads of 128 channels, rows that divide by 256."""
NARROW = transformer_shapes(256, 2)
"""Heads of 128 channels; for layouts that do not quantise."""
SMALL = transformer_shapes(96, 6)
"""For adapters, which have no such rules."""


def transformer(shapes: Mapping[str, tuple[int, ...]] = MINIATURE) -> Weights:
    """Its weights under diffusers' names, bfloat16."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).bfloat16()
        for name, shape in shapes.items()
    }


def text_encoder() -> Weights:
    """Two layers of Qwen3, under the names of transformers' Qwen3ForCausalLM."""
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, FEATURES), "model.norm.weight": (FEATURES,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (FEATURES,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{norm}.weight": (64,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"{layer}.self_attn.q_proj.weight": (256, FEATURES), f"{layer}.self_attn.o_proj.weight": (256, 256)}
        shapes |= {f"{layer}.self_attn.{part}.weight": (128, FEATURES) for part in ("k_proj", "v_proj")}
        shapes |= {f"{layer}.mlp.{part}.weight": (512, FEATURES) for part in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (FEATURES, 512)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def comfyui(weights: Weights, prefix: str = "") -> Weights:
    """The original code's layout: query, key and value in one matrix, other names for a few modules."""
    out: Weights = {}
    for name, tensor in weights.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [weights[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            out[prefix + name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
            continue
        for ours, theirs in (
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
            (".to_out.0.", ".out."),
            (".norm_q.", ".q_norm."),
            (".norm_k.", ".k_norm."),
        ):
            name = name.replace(ours, theirs)
        out[prefix + name] = tensor
    return out


def vae() -> Weights:
    """A small AutoencoderKL's weights under diffusers' names, from diffusers itself."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(3)
    config = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model = AutoencoderKL.from_config(config)
    assert isinstance(model, AutoencoderKL)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def ldm(weights: Weights, levels: int, prefix: str = "") -> Weights:
    """A VAE in LDM's names: up blocks counted from the other end, attention as 1 x 1 convolutions."""
    out: Weights = {}
    for name, tensor in weights.items():
        if ".attentions." in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for i in range(levels):
            name = name.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.")
        for ours, theirs in (
            ("down_blocks.", "down."),
            (".mid_block.resnets.0.", ".mid.block_1."),
            (".mid_block.resnets.1.", ".mid.block_2."),
            (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
            (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
            (".mid_block.attentions.0.to_", ".mid.attn_1."),
            (".resnets.", ".block."),
            (".conv_shortcut.", ".nin_shortcut."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            (".conv_norm_out.", ".norm_out."),
        ):
            name = name.replace(ours, theirs)
        out[prefix + name] = tensor
    return out


def write(path: Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, path, dict(metadata) if metadata else None
    )
    return path


def marker(**fields: object) -> torch.Tensor:
    """A ``comfy_quant`` tensor: JSON as bytes."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Which tensors the published quantised files quantise: the blocks' matrices."""
    return tensor.ndim == 2 and ".weight" in name and (".attention." in name or ".feed_forward." in name)


def fp8(weight: torch.Tensor, rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 e4m3, float32 scale): the largest number of the tensor, or of each row, becomes 448."""
    amax = weight.float().abs().amax(dim=1, keepdim=True) if rows else weight.float().abs().max()
    scale = amax / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def int8(weight: torch.Tensor, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    amax = weight.float().abs().amax(dim=1, keepdim=True) if rows else weight.float().abs().max()
    scale = amax / 127
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def rotated(weight: torch.Tensor, group: int = 256) -> torch.Tensor:
    """Groups of columns times the regular Hadamard matrix of that size."""
    matrix = torch.ones(1, 1)
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    while len(matrix) < group:
        matrix = torch.kron(four, matrix)
    matrix /= math.sqrt(group)
    return torch.cat([part @ matrix for part in weight.float().split(group, dim=1)], dim=1)


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """Block scales in cuBLAS's order, written out one by one, tiles padded with zeros."""
    rows, columns = scales.shape
    padded_rows, padded_columns = -(-rows // 128) * 128, -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = (r // 128) * (padded_columns // 4) + c // 4
    place = tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
    out = torch.zeros(padded_rows * padded_columns, dtype=scales.dtype)
    out[place.flatten()] = scales.flatten()
    return out.reshape(padded_rows, padded_columns)


FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """(the tensors of a layer without its name, the numbers that they stand for)."""
    blocks = weight.float().unflatten(1, (-1, 16))
    scale_2 = weight.float().abs().max() / (448 * 6)
    scale = (blocks.abs().amax(-1) / 6 / scale_2).clamp(max=448).to(torch.float8_e4m3fn)
    unit = (scale.float() * scale_2)[..., None]
    codes = (blocks.abs() / unit.clamp(min=1e-30)).unsqueeze(-1).sub(FP4).abs().argmin(-1)
    negative = blocks < 0
    values = FP4[codes] * torch.where(negative, -1.0, 1.0) * unit
    nibbles = (codes + 8 * negative).flatten(1).to(torch.uint8)
    packed = nibbles[:, 0::2] * 16 + nibbles[:, 1::2]
    tensors = {"weight": packed, "weight_scale": tiled(scale.view(torch.uint8)).view(torch.float8_e4m3fn)}
    return {**tensors, "weight_scale_2": scale_2, "input_scale": torch.tensor(0.25)}, values.flatten(1)


def mxfp8(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=1e-30) / 448))
    values = (blocks / 2 ** exponent[..., None]).to(torch.float8_e4m3fn)
    tensors = {"weight": values.flatten(1), "weight_scale": tiled((exponent + 127).to(torch.uint8))}
    return tensors, (values.float() * 2 ** exponent[..., None]).flatten(1)
