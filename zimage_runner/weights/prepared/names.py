"""Tensor names of a prepared checkpoint: what inference drops, what is fused, and in which order it is used.

These rules are the one place where the published names and the prepared names meet: ``prepare`` applies them to
files, and an engine that reads the published layout directly applies the same rules to its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COMPONENTS = ("text_encoder", "transformer", "vae")
"""Components with weights, in use order: the text encoder is needed first, the picture decoder last."""

FUSIONS = {
    "text_encoder": (
        ("self_attn.qkv_proj.", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
        ("gate_up_proj.", ("mlp.gate_proj.", "mlp.up_proj.")),
    ),
    "transformer": (
        ("attention.qkv.", ("attention.to_q.", "attention.to_k.", "attention.to_v.")),
        ("feed_forward.w1w3.", ("feed_forward.w1.", "feed_forward.w3.")),
    ),
    "vae": (),
}
"""Fused name and the published names that are concatenated along dimension 0 (output features) to make it.

The fused names are those of engine=native's modules; all other tensors keep their published names.
"""

QUANTISED = re.compile(r"(noise_refiner|layers)\.\d+\.(attention\.(qkv|to_out\.0)|feed_forward\.(w1w3|w2))\.weight")
"""Prepared names of the transformer's weights that a copy in eight bits holds in eight bits."""

_FIRST = {
    "text_encoder": ("layers.",),
    "transformer": (
        "cap_embedder.", "cap_pad_token", "context_refiner.", "t_embedder.", "all_x_embedder.", "x_pad_token",
        "noise_refiner.", "layers.", "all_final_layer.",
    ),
    "vae": ("post_quant_conv.", "decoder.conv_in.", "decoder.mid_block.", "decoder.up_blocks."),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTensor:
    """One tensor of a prepared component."""

    name: str
    sources: tuple[str, ...]
    """Published names; more than one are concatenated along dimension 0."""


def canonical(component: str, published: str) -> str:
    """The published name without the ``model.`` that Qwen3ForCausalLM checkpoints put before the encoder's names."""
    return published.removeprefix("model.") if component == "text_encoder" else published


def prepared_tensors(component: str, published: Iterable[str], *, num_hidden_layers: int = 0) -> list[NamedTensor]:
    """What a prepared ``component`` holds, in use order, given the published tensor names.

    ``num_hidden_layers`` is the text encoder's: captions are ``hidden_states[-2]``, so its last layer and final norm
    are never computed. Rows of its table of tokens are read where they were published (native/token_table.py).
    """
    kept = {canonical(component, name): name for name in published}
    kept = {name: source for name, source in kept.items() if _is_used(component, name, num_hidden_layers)}
    tensors = []
    for name in kept:
        fusion = _fusion(component, name, kept)
        if fusion is None:
            tensors.append(NamedTensor(name=name, sources=(kept[name],)))
        elif name == fusion[1][0]:
            tensors.append(NamedTensor(name=fusion[0], sources=tuple(kept[part] for part in fusion[1])))
    return sorted(tensors, key=lambda tensor: _use_order(component, tensor.name))


def _is_used(component: str, name: str, num_hidden_layers: int) -> bool:
    if component == "vae":
        return name.startswith(("decoder.", "post_quant_conv."))
    if component == "text_encoder":
        return not name.startswith(("embed_tokens.", "lm_head.", "norm.", f"layers.{num_hidden_layers - 1}."))
    return True


def _fusion(component: str, name: str, kept: dict[str, str]) -> tuple[str, Sequence[str]] | None:
    """(fused name, its parts' canonical names) when all of the parts exist."""
    for fused, parts in FUSIONS[component]:
        for part in parts:
            if part in name:
                siblings = [name.replace(part, other) for other in parts]
                return (name.replace(part, fused), siblings) if all(s in kept for s in siblings) else None
    return None


def _use_order(component: str, name: str) -> tuple[int, list[tuple[int, str]]]:
    groups = _FIRST[component]
    group = next((i for i, prefix in enumerate(groups) if name.startswith(prefix)), len(groups))
    # Numbers by value: layers.2 before layers.10.
    return group, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
