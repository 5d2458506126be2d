"""The single-stream diffusion transformer of Z-Image, in the published weights' names.

Arithmetic follows diffusers' ZImageTransformer2DModel (basic mode); what differs is when it is done: everything
that depends on the step alone (``modulation``), on the caption alone (``embed_caption``) or on the shape alone
(rotary tables) is computed outside ``forward``, which is left with the matrix products and one fused operation
between each two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Linear, PackedLinear
from zimage_runner.engines.native.rope import RotaryTable, padded_length
from zimage_runner.engines.native.sdpa import Attend
from zimage_runner.model import PATCH

ADALN_WIDTH = 256
TIMESTEP_HIDDEN = 1024
FREQUENCIES = 256
QK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """The fields of the published ``transformer/config.json`` that decide the arithmetic."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read a config.json. Raises ValueError for a variant that this module does not compute."""
        only = {
            "all_patch_size": [PATCH],
            "all_f_patch_size": [1],
            "siglip_feat_dim": None,
            "qk_norm": True,
            "n_kv_heads": config["n_heads"],
        }
        for name, value in only.items():
            if config.get(name, value) != value:
                raise ValueError(f"transformer/config.json: {name}={config[name]!r} is not supported, only {value!r}")
        values: dict[str, Any] = {field.name: config[field.name] for field in fields(cls)}
        values.update({name: tuple(values[name]) for name in ("axes_dims", "axes_lens")})
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def adaLN_width(self) -> int:
        """Features of a step's time; config.json does not say it."""
        return min(self.dim, ADALN_WIDTH)

    @property
    def hidden_dim(self) -> int:
        return int(self.dim / 3 * 8)


class BlockModulation(NamedTuple):
    """A block's four float32 vectors [dim], learned norm weights multiplied in.

    Scales are weight * (1 + scale), gates weight * tanh(gate); without adaLN both are the weight alone.
    """

    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    ffn_scale: torch.Tensor
    ffn_gate: torch.Tensor


class StepModulation(NamedTuple):
    """One step's vectors: blocks [noise refiner + main, 4, dim] and the final layer's scale [dim], float32."""

    blocks: torch.Tensor
    final: torch.Tensor

    def block(self, index: int) -> BlockModulation:
        return BlockModulation(*self.blocks[index].unbind(0))


class SelfAttention(nn.Module):
    """Query, key and value in one product, RMS norm per head, rotary embedding, attention, output product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.qkv = PackedLinear(config.dim, 3 * config.dim, bias=False)
        self.norm_qk = nn.Parameter(torch.empty(2, config.head_dim))
        self.out = PackedLinear(config.dim, config.dim, bias=False)

    def forward(
        self, h: torch.Tensor, rope: RotaryTable, ops: Operations, attend: Attend, keep: int | None
    ) -> torch.Tensor:
        """Of the first ``keep`` tokens only, where given; all tokens are attended to."""
        query, key, value = ops.qk_norm_rope(self.qkv(h), self.norm_qk, rope.cos, rope.sin, QK_NORM_EPS)
        # Dropped afterwards: cuDNN takes longer to plan for another number of queries than to compute a few more.
        return self.out(attend(query, key, value)[:, :keep].flatten(2))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), w1 and w3 in one product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1w3 = PackedLinear(config.dim, 2 * config.hidden_dim, bias=False)
        self.w2 = PackedLinear(config.hidden_dim, config.dim, bias=False)

    def forward(self, h: torch.Tensor, ops: Operations) -> torch.Tensor:
        return self.w2(ops.swiglu(self.w1w3(h)))


class Block(nn.Module):
    """A transformer block with a norm before and after each of its two halves.

    Takes and returns both the residual stream x and h, the normed and scaled input of the next product, because
    adding to x and norming it for what follows is one pass over memory.
    """

    def __init__(self, config: TransformerConfig, modulated: bool) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = nn.Parameter(torch.empty(config.dim))
        self.attention_norm2 = nn.Parameter(torch.empty(config.dim))
        self.ffn_norm1 = nn.Parameter(torch.empty(config.dim))
        self.ffn_norm2 = nn.Parameter(torch.empty(config.dim))
        self.adaLN_modulation = Linear(config.adaLN_width, 4 * config.dim) if modulated else None

    def adaLN(self) -> Linear:
        """The layer that makes a step's scales and gates, of a block that has one."""
        assert self.adaLN_modulation is not None
        return self.adaLN_modulation

    def norms(self) -> list[torch.Tensor]:
        """The learned weights [dim] of its norms, in BlockModulation's order."""
        return [self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2]

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        modulation: BlockModulation,
        next_scale: torch.Tensor | None,
        rope: RotaryTable,
        ops: Operations,
        attend: Attend,
        keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``keep`` drops all but the first tokens on the way, where nothing later reads the others."""
        update = self.attention(h, rope, ops, attend, keep)
        x = x[:, :keep]
        x, h = ops.add_gated_norm(x, update, modulation.attention_gate, modulation.ffn_scale, self.eps)
        return ops.add_gated_norm(x, self.feed_forward(h, ops), modulation.ffn_gate, next_scale, self.eps)


class Transformer(nn.Module):
    """Velocity prediction: image latents and a refined caption in, latents' velocity out."""

    def __init__(self, config: TransformerConfig, ops: Operations, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.attend = attend
        patch_dim = PATCH * PATCH * config.in_channels
        self.x_embedder = Linear(patch_dim, config.dim)
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.t_embedder_in = Linear(FREQUENCIES, TIMESTEP_HIDDEN)
        self.t_embedder_out = Linear(TIMESTEP_HIDDEN, config.adaLN_width)
        self.cap_norm = nn.Parameter(torch.empty(config.cap_feat_dim))
        self.cap_embedder = Linear(config.cap_feat_dim, config.dim)
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.noise_refiner = nn.ModuleList(Block(config, True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config, True) for _ in range(config.n_layers))
        self.final_modulation = Linear(config.adaLN_width, config.dim)
        self.final_linear = Linear(config.dim, patch_dim)

    def modulation(self, embedded_times: torch.Tensor) -> list[StepModulation]:
        """What each step's time does to the network; embedded_times [steps, FREQUENCIES] (see ``embed_times``).

        Computed in float32 from the stored weights: it is done once a schedule, and its rounding would touch
        every token of every step. Products fill one tensor that the rest then works on as a whole: few launches, and
        few kernels to load in the seconds before the first picture.
        """
        hidden = F.silu(self._linear_float32(self.t_embedder_in, embedded_times))
        adaln_input = self._linear_float32(self.t_embedder_out, hidden)
        modulated = blocks_of(self.noise_refiner) + blocks_of(self.layers)
        raw = adaln_input.new_empty(len(modulated), len(adaln_input), 4 * self.config.dim)
        for block, out in zip(modulated, raw):
            self._linear_float32(block.adaLN(), adaln_input, out)
        factors = raw.unflatten(-1, (4, -1))
        factors[:, :, 0::2].add_(1)
        factors[:, :, 1::2].tanh_()
        factors.mul_(norms_of(modulated)[:, None])
        final = self._linear_float32(self.final_modulation, F.silu(adaln_input)).add_(1)
        return [StepModulation(*step) for step in zip(factors.unbind(1), final.unbind(0))]

    def _linear_float32(self, linear: Linear, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.ops.linear_float32(x, linear.weight, linear.bias, out)

    def embed_caption(self, features: torch.Tensor, tokens: int, rope: RotaryTable) -> torch.Tensor:
        """Refined caption tokens [batch, length, dim]; the same for every step and seed.

        features [batch, length, cap_feat_dim], length a multiple of 32; from ``tokens`` on the learned padding token
        stands; rope the caption's own table.
        """
        normed = self.ops.scaled_rms_norm(features, self.cap_norm.float(), self.config.norm_eps)
        x = self.cap_embedder(normed)
        x[:, tokens:] = self.cap_pad_token
        refiner = blocks_of(self.context_refiner)
        vectors = [BlockModulation(*norms) for norms in norms_of(refiner)] if refiner else []
        return self._run(self.context_refiner, x, vectors, rope)

    def forward(
        self,
        latents: torch.Tensor,
        caption: torch.Tensor,
        modulation: StepModulation,
        image_rope: RotaryTable,
        unified_rope: RotaryTable,
    ) -> torch.Tensor:
        """Velocity (picture minus noise) float32 of latents [batch, in_channels, height, width] float32."""
        height, width = latents.shape[-2:]
        refiners = len(self.noise_refiner)
        vectors = [modulation.block(i) for i in range(refiners + len(self.layers))]
        x = self._run(self.noise_refiner, self.embed_image(latents), vectors[:refiners], image_rope)
        x = torch.cat([x, caption], dim=1)
        x = self._run(self.layers, x, vectors[refiners:], unified_rope, keep=height * width // PATCH**2)
        return self.unembed(x, modulation.final, height, width)

    def embed_image(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to tokens [batch, padded_length, dim], channels last within a patch, padding tokens behind."""
        batch, channels, height, width = latents.shape
        patches = latents.to(self.x_embedder.weight.dtype).view(
            batch, channels, height // PATCH, PATCH, width // PATCH, PATCH
        )
        tokens = self.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        missing = padded_length(tokens.shape[1]) - tokens.shape[1]
        if missing:
            tokens = torch.cat([tokens, self.x_pad_token.expand(batch, missing, -1)], dim=1)
        return tokens

    def unembed(self, tokens: torch.Tensor, scale: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Final layer norm, scale and product, then tokens back to latents, float32."""
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:], scale, None, FINAL_NORM_EPS).to(tokens.dtype)
        patches = self.final_linear(normed).float()
        grid = patches.view(len(tokens), height // PATCH, width // PATCH, PATCH, PATCH, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)

    def _run(
        self,
        blocks: nn.ModuleList,
        x: torch.Tensor,
        vectors: list[BlockModulation],
        rope: RotaryTable,
        keep: int | None = None,
    ) -> torch.Tensor:
        """All blocks in turn; of the last one only the first ``keep`` tokens, where given."""
        if not vectors:
            return x[:, :keep]
        h = self.ops.scaled_rms_norm(x, vectors[0].attention_scale, self.config.norm_eps)
        next_scales = [v.attention_scale for v in vectors[1:]] + [None]
        for block, vector, next_scale in zip(blocks_of(blocks), vectors, next_scales):
            x, h = block(x, h, vector, next_scale, rope, self.ops, self.attend, keep if next_scale is None else None)
        return x


def blocks_of(modules: nn.ModuleList) -> list[Block]:
    """The list's members with their type."""
    return cast("list[Block]", list(modules))


def norms_of(blocks: list[Block]) -> torch.Tensor:
    """Learned norm weights [blocks, 4, dim] float32, in BlockModulation's order."""
    return torch.stack([norm for block in blocks for norm in block.norms()]).float().unflatten(0, (-1, 4))


def embed_times(times: torch.Tensor, t_scale: float) -> torch.Tensor:
    """Sinusoids [steps, FREQUENCIES] of times [steps] float32, 0 (noise) .. 1 (picture), on the CPU."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32) / half
    angles = (times * t_scale)[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
