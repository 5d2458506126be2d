"""The one table of names: how each layout names the tensors and modules of Z-Image, and how diffusers does.

The published names (diffusers' for transformer and VAE, transformers' Qwen3Model for the text encoder) are what the
rest of the package knows. Layouts: ComfyUI's (the original code's: query, key and value fused), LDM's for the VAE,
llama.cpp's for the text encoder. Names of tensors ("layers.0.attention.qkv.weight") and of modules
("layers.0.attention.qkv"), which adapters use, go through the same functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FUSED_QKV = "attention.qkv"
BLOCK_MODULES = {
    FUSED_QKV: ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}
"""ComfyUI's modules of a transformer block that diffusers names otherwise; several are stacked, in equal parts."""
MODULES = {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
"""ComfyUI's modules outside the blocks that diffusers names otherwise."""
PAD_TOKENS = ("x_pad_token", "cap_pad_token")
"""Stored [dim] or [1, dim]; published [1, dim]."""
JUNK = {
    "transformer": re.compile(r"norm_final\.weight"),
    "text_encoder": re.compile(r"lm_head\.weight|logit_scale|.*rotary_emb\.inv_freq|rope_freqs\.weight"),
    "vae": re.compile(r"$^"),
}
"""Tensors without use that real files hold: a leftover of Lumina 2, the tied head of a language model."""

_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.(\d+)\.(.+)")
_PREFIXES = (
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("text_encoders.qwen3_4b.transformer.", "text_encoder"),
    ("text_encoders.qwen3_4b.", "text_encoder"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
_TEXT_ENCODER = re.compile(
    r"(model\.)?(embed_tokens|norm|lm_head|layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm))\."
    r"|(token_embd|output_norm|output|rope_freqs)\.weight|blk\.\d+\."
)
_VAE = re.compile(r"(encoder|decoder)\.|(post_)?quant_conv\.")
_BELOW_A_PREFIX = re.compile(
    r"(.+\.)(cap_embedder\.0\.weight|embed_tokens\.weight|token_embd\.weight|decoder\.conv_in\.weight)"
)
"""A tensor of each component that has one name in all layouts, or one in each."""
_LLAMA_CPP = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LLAMA_CPP_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_LDM = (
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"down\.(\d+)\.block\.(\d+)\.", r"down_blocks.\1.resnets.\2."),
    (r"down\.(\d+)\.downsample\.conv\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"up\.(\d+)\.block\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
    (r"up\.(\d+)\.upsample\.conv\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"norm_out\.", "conv_norm_out."),
)


def component_of(name: str) -> tuple[str, str]:
    """(component, name without the file's prefix) of a stored tensor's name; the unknown is the transformer's."""
    for prefix, component in _PREFIXES:
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    if _TEXT_ENCODER.match(name):
        return "text_encoder", name
    return ("vae" if _VAE.match(name) else "transformer"), name


def prefix_of(name: str) -> str:
    """The prefix that ``component_of`` takes off, or nothing."""
    return name.removesuffix(component_of(name)[1])


def unknown_prefix(names: Iterable[str]) -> str | None:
    """What stands before the names of Z-Image in ``names``, which no layout has there; None if they are no such names.

    ``names`` are without the prefixes that ``component_of`` takes off.
    """
    return next((match[1] for match in map(_BELOW_A_PREFIX.fullmatch, names) if match), None)


def published(component: str, name: str, levels: int = 0) -> tuple[str, ...]:
    """The published names of what is stored as ``name``: several are stacked in it along its rows, in equal parts.

    ``levels`` is the number of resolutions of an LDM-named VAE, whose decoder counts them from the other end. Names
    that are published ones already, and unknown ones, come back as they are.
    """
    if component == "transformer":
        return _transformer(name)
    return (_text_encoder(name),) if component == "text_encoder" else (_vae(name, levels),)


def ldm_levels(names: list[str]) -> int:
    """How many resolutions the LDM-named VAE tensors ``names`` speak of."""
    found = (re.match(r"decoder\.up\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _transformer(name: str) -> tuple[str, ...]:
    block = _BLOCK.fullmatch(name)
    if block:
        before = f"{block[1]}.{block[2]}."
        for module, parts in BLOCK_MODULES.items():
            if _is_under(block[3], module):
                return tuple(before + part + block[3].removeprefix(module) for part in parts)
        return (name,)
    for module, other in MODULES.items():
        if _is_under(name, module):
            return (other + name.removeprefix(module),)
    return (name,)


def _is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _text_encoder(name: str) -> str:
    name = name.removeprefix("model.")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"layers.{block[1]}.{_LLAMA_CPP.get(block[2], block[2])}.weight"
    module, _, leaf = name.rpartition(".")
    return f"{_LLAMA_CPP_OUTSIDE[module]}.{leaf}" if module in _LLAMA_CPP_OUTSIDE else name


def _vae(name: str, levels: int) -> str:
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    for pattern, replacement in _LDM:
        rest, count = re.subn("^" + pattern, replacement, rest)
        if count:
            break
    if half == "decoder" and name.startswith("decoder.up."):
        rest = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", rest)
    return f"{half}.{rest.replace('.nin_shortcut.', '.conv_shortcut.')}"
