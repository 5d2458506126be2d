"""The caption encoder: Qwen3 without its last layer, head and cache, because Z-Image reads ``hidden_states[-2]``.

Arithmetic follows transformers' Qwen3Model. Attention is causal and captions are padded on the right, so a
caption's tokens never see padding and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.kernels.torch_ops import normalised
from zimage_runner.engines.native.layers import Linear

CUDNN_CARDS = ((9, 0), (10, 0))
"""Compute capabilities on which PyTorch prefers cuDNN's attention."""
ATTENDED = 128
"""There, what a caption's attention gets is filled up to a multiple of so many tokens: cuDNN makes a plan for each
length, in 50 ms. The results are the same bits: tests/gpu/test_memory.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """The fields of the published ``text_encoder/config.json`` that decide the arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> TextEncoderConfig:
        """Read a config.json. Raises ValueError for a variant that this module does not compute."""
        # transformers 5 writes rope_parameters, version 4 rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        only = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False}
        for name, value in only.items():
            if config.get(name, value) != value:
                raise ValueError(f"text_encoder/config.json: {name}={config[name]!r} is not supported, only {value!r}")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"text_encoder/config.json: rope_type={rope['rope_type']!r} is not supported")
        if config.get("use_sliding_window"):
            raise ValueError("text_encoder/config.json: use_sliding_window=true is not supported")
        derived = {
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        }
        return cls(**{f.name: derived.get(f.name) or config[f.name] for f in fields(cls)})


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 throughout; the weight is kept in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor, ops: Operations) -> torch.Tensor:
        return ops.scaled_rms_norm(x, self.weight.float(), self.eps)


class Qwen3Attention(nn.Module):
    """Causal attention with fewer key and value heads than query heads, and a norm per head."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, h: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """All heads' results [batch, tokens, heads * head_dim], for o_proj."""
        qkv = self.qkv_proj(h).unflatten(-1, (-1, self.head_dim))
        # Query and key heads together: a caption is so short that every launch costs more than its work.
        both, value = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        normed = normalised(both.float(), self.q_norm.eps)
        normed[:, :, : self.heads].mul_(self.q_norm.weight)
        normed[:, :, self.heads :].mul_(self.k_norm.weight)
        query, key = rotate_halves(normed, turns).to(h.dtype).split([self.heads, self.kv_heads], dim=2)
        tokens = h.shape[1]
        more = tokens_to_add(tokens, h.device)
        query, key, value = (
            F.pad(part.transpose(1, 2), (0, 0, 0, more)) if more else part.transpose(1, 2)
            for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out[:, :, :tokens].transpose(1, 2).flatten(2)


def tokens_to_add(tokens: int, device: torch.device) -> int:
    """How many zeros follow a caption's tokens in its attention: causal, so that no token sees them."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in CUDNN_CARDS:
        return 0
    return -tokens % ATTENDED


class Qwen3Layer(nn.Module):
    """Attention and SwiGLU feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, ops: Operations) -> None:
        """Overwrites x."""
        attended = self.self_attn(self.input_layernorm(x, ops), turns)
        add_product(x, attended, self.self_attn.o_proj)
        hidden = ops.swiglu(self.gate_up_proj(self.post_attention_layernorm(x, ops)))
        add_product(x, hidden, self.down_proj)


class TextEncoder(nn.Module):
    """Token vectors to caption features. Where the vectors come from: token_table.py."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, x: torch.Tensor, turns: torch.Tensor, ops: Operations) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden_size] before the last layer; overwrites x.

        x: vectors of the tokens [batch, tokens, hidden_size] padded on the right; turns as ``rotary`` gives them, on
        the device.
        """
        for layer in self.layers:
            layer(x, turns, ops)
        return x

    def rotary(self, tokens: int) -> torch.Tensor:
        """cos + i sin of each token's angles [tokens, 1, head_dim / 2], complex64, on the CPU.

        A GPU would load a kernel for each of these operations when the process first uses it: a tenth of a second.
        """
        dim = self.config.head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        positions = torch.arange(tokens, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / self.config.rope_theta**exponent)
        return torch.complex(angles.cos(), angles.sin())[:, None]


def rotate_halves(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate channel i against channel i + head_dim / 2. x [batch, tokens, heads, head_dim] float32.

    The two end up side by side: in query and key alike, so that their products are what they were.
    """
    return torch.view_as_real(torch.complex(*x.chunk(2, dim=-1)).mul_(turns)).flatten(-2)


def add_product(x: torch.Tensor, h: torch.Tensor, linear: Linear) -> None:
    """x += linear(h), as one operation; x [batch, tokens, hidden_size] contiguous, linear without bias."""
    x.flatten(0, 1).addmm_(h.flatten(0, 1), linear.weight.t())
