"""The keys of adapter files: which tensors of the model each is about, and which factor of the change it holds.

Trainers spell a module with dots or underscores, with or without a prefix, fused or split, in a dozen ways. Written
with underscores alone, all spellings of a module are the same word, which one table knows.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from zimage_runner.weights.formats.names import BLOCK_MODULES, MODULES, PAD_TOKENS, published

_PREFIXES = {
    "transformer": (
        "base_model_model_", "model_diffusion_model_", "diffusion_model_", "transformer_", "lora_unet_",
        "lora_transformer_", "lycoris_", "unet_",
    ),
    "text_encoder": (
        "text_encoders_qwen3_4b_transformer_model_", "text_encoders_qwen3_4b_transformer_", "text_encoder_model_",
        "text_encoder_", "lora_te1_model_", "lora_te1_", "lora_te_model_", "lora_te_",
    ),
}  # fmt: skip
_BLOCK = {
    "transformer": (
        *BLOCK_MODULES, "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "attention.norm_q",
        "attention.norm_k", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
        "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2",
    ),
    "text_encoder": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
        "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
        "post_attention_layernorm",
    ),
}  # fmt: skip
_OUTSIDE = {
    "transformer": (
        "x_embedder", "all_x_embedder.2-1", "final_layer.linear", "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1", "t_embedder.mlp.0",
        "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1", *PAD_TOKENS,
    ),
    "text_encoder": ("embed_tokens", "norm"),
}  # fmt: skip
_LISTS = {"transformer": "layers|noise_refiner|context_refiner", "text_encoder": "layers"}

_ROLES = (
    (r"lora_(?:A|down)(?:\.[\w-]+)?\.weight|lora\.down\.weight", "down"),
    (r"lora_(?:B|up)(?:\.[\w-]+)?\.weight|lora\.up\.weight", "up"),
    (r"alpha", "alpha"),
    (r"dora_scale|magnitude|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?", "magnitude"),
    (r"(?P<factor>lokr_w[12](?:_[ab])?|hada_w[12]_[ab])", r"\g<factor>"),
    (r"diff|w_norm", "diff"),
    (r"diff_b|b_norm", "diff_b"),
    (r"set_weight", "set_weight"),
)
_KEY = tuple((re.compile(rf"(?P<module>.+?)\.(?:{pattern})"), role) for pattern, role in _ROLES)


@dataclass(frozen=True, slots=True)
class Target:
    """What a module's spelling means in the model."""

    component: str
    """transformer or text_encoder."""
    modules: tuple[str, ...]
    """Published names; of several the weights are stacked along their rows, as in the fused module that is meant."""
    is_fused_spelling: bool
    """Spelled as ComfyUI's qkv or out: some files hold these beside the split ones, meaning the same change."""

    def tensors(self, leaf: str) -> tuple[str, ...]:
        """Published names of the modules' weights or biases (``leaf``); a padding token is its own weight."""
        return tuple(module if module in PAD_TOKENS else f"{module}.{leaf}" for module in self.modules)


def split_key(key: str) -> tuple[str, str] | None:
    """(module as spelled, role of the tensor) of an adapter's key; None where the role is not known.

    Roles: down, up, alpha, magnitude, lokr_w1, lokr_w1_a ..., hada_w1_a ..., diff, diff_b, set_weight.
    """
    for pattern, role in _KEY:
        match = pattern.fullmatch(key)
        if match:
            return match["module"], match.expand(role)
    return None


def target_of(module: str) -> Target | None:
    """The modules that a spelling means; None where it means none of Z-Image or its text encoder."""
    word = re.sub(r"[._]+", "_", module)
    component, word = _without_prefixes(word)
    return _lookup(component, word)


def _without_prefixes(word: str) -> tuple[str, str]:
    component = "transformer"
    while True:
        for name, prefixes in _PREFIXES.items():
            prefix = next((prefix for prefix in prefixes if word.startswith(prefix)), None)
            if prefix:
                component, word = name, word.removeprefix(prefix)
                break
        else:
            return component, word


def _lookup(component: str, word: str) -> Target | None:
    block = re.fullmatch(rf"({_LISTS[component]})_(\d{{1,4}})_(.+)", word)
    if block:
        module = _words(component, True).get(block[3])
        name = f"{block[1]}.{int(block[2])}.{module}" if module else None
    else:
        name = _words(component, False).get(word)
    if name is None:
        return None
    is_fused = any(name.endswith("." + module) for module in BLOCK_MODULES) or name.split(".")[0] in MODULES
    return Target(component, published(component, name), is_fused)


@functools.cache
def _words(component: str, in_block: bool) -> dict[str, str]:
    modules = (_BLOCK if in_block else _OUTSIDE)[component]
    return {re.sub(r"[._]+", "_", module): module for module in modules}
