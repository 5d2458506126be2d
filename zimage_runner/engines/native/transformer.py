"""The single-stream diffusion transformer of Z-Image, in the published weights' names.

Arithmetic follows diffusers' ZImageTransformer2DModel (basic mode); what differs is when it is done: everything
that depends on the step alone (``modulation``), on the caption alone (``embed_caption``) or on the shape alone
(rotary tables) is computed outside ``forward``, which is left with the matrix products and one fused operation
between each two of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Linear, PackedLinear
from zimage_runner.engines.native.quantised import FP8, Format, Quantised, QuantisedLinear, Scaled
from zimage_runner.engines.native.rope import RotaryTable, padded_length
from zimage_runner.engines.native.sdpa import Attend, AttendFp8
from zimage_runner.engines.native.streaming import BlockStream
from zimage_runner.model import PATCH

ADALN_WIDTH = 256
TIMESTEP_HIDDEN = 1024
FREQUENCIES = 256
QK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
ROUNDING = 17 / 16
"""A number rounded to e4m3 is no larger than this times what it was."""

Attends = Callable[..., torch.Tensor]
"""An Attend, or an AttendFp8 where scales are there."""


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
    ``attention_input``: scales [3, heads] of query, key and value where attention multiplies in eight bits.
    """

    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    ffn_scale: torch.Tensor
    ffn_gate: torch.Tensor
    attention_input: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Hints:
    """What is added to the residual stream behind some of a row of blocks: a ControlNet's."""

    places: frozenset[int]
    """Which blocks of the row, counted from 0."""
    make: Callable[[], torch.Tensor]
    """Gives the next one [batch, tokens, dim], which may be overwritten."""
    scale: torch.Tensor
    """[batch, 1, 1] float32."""

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, dim] with the next hint added, of which x may have the first tokens. x is overwritten."""
        return x.add_(self.make()[:, : x.shape[1]].mul_(self.scale))


class StepModulation(NamedTuple):
    """One step's vectors: blocks [noise refiner + main, 4, dim] and the final layer's scale [dim], float32.

    ``attention_input`` [noise refiner + main, 3, heads]: see BlockModulation.
    """

    blocks: torch.Tensor
    final: torch.Tensor
    attention_input: torch.Tensor | None = None

    def block(self, index: int) -> BlockModulation:
        return block_modulation(self.blocks, self.attention_input, index)

    def tensors(self) -> list[torch.Tensor]:
        """Those there are: ``StepModulation(*step.tensors())`` is the step again."""
        return [tensor for tensor in self if tensor is not None]


def block_modulation(blocks: torch.Tensor, attention_input: torch.Tensor | None, index: int) -> BlockModulation:
    """One block's vectors of those of several: blocks [blocks, 4, dim], attention_input [blocks, 3, heads]."""
    scales = None if attention_input is None else attention_input[index]
    return BlockModulation(*blocks[index].unbind(0), attention_input=scales)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """In what the transformer's blocks multiply."""

    dtype: torch.dtype = torch.float32
    """Of the residual stream and of everything that ``form`` is not for."""
    form: Format | None = None
    """Of the factors of the noise refiner's and the main blocks' products; None: ``dtype``."""
    plain_layers: frozenset[int] = frozenset()
    """Main blocks that multiply in ``dtype`` all the same."""

    def of_layer(self, number: int) -> Arithmetic:
        """A main block's own."""
        return replace(self, form=None) if number in self.plain_layers else self

    def linear(self, inputs: int, outputs: int, folded: bool = False) -> nn.Module:
        """A product without bias. ``folded``: what follows it applies scales, where there are any."""
        if self.form is None:
            return PackedLinear(inputs, outputs, bias=False)
        return QuantisedLinear(inputs, outputs, self.form, self.dtype, folded)


PLAIN = Arithmetic()


class SelfAttention(nn.Module):
    """Query, key and value in one product, RMS norm per head, rotary embedding, attention, output product."""

    def __init__(self, config: TransformerConfig, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.form = arithmetic.form
        self.qkv = arithmetic.linear(config.dim, 3 * config.dim)
        self.norm_qk = nn.Parameter(torch.empty(2, config.head_dim))
        self.out = arithmetic.linear(config.dim, config.dim, folded=True)

    def forward(
        self,
        h: torch.Tensor | Quantised,
        rope: RotaryTable,
        ops: Operations,
        attend: Attends,
        keep: int | None,
        scales: torch.Tensor | None,
    ) -> torch.Tensor | Scaled:
        """Of the first ``keep`` tokens only, where given; all tokens are attended to.

        ``scales``: of query, key and value in eight bits, which ``attend`` takes then.
        """
        qkv = self.qkv(h)
        if scales is None:
            attended = attend(*ops.qk_norm_rope(qkv, self.norm_qk, rope.cos, rope.sin, QK_NORM_EPS))
        else:
            eight = ops.qk_norm_rope_quantised(qkv, self.norm_qk, rope.cos, rope.sin, QK_NORM_EPS, scales)
            attended = attend(*eight, scales)
        # Dropped afterwards: cuDNN takes longer to plan for another number of queries than to compute a few more.
        return self.out(ops.product_input(attended[:, :keep].flatten(2), self.form))

    def input_scales(self, norm_scales: torch.Tensor) -> torch.Tensor:
        """Scales [steps, 3, heads] with which query, key and value surely fit into e4m3.

        norm_scales [steps, dim]: what the input was normed and multiplied by, so that it is no longer than its largest
        magnitude times the root of dim. A normed query is no longer than the root of head_dim times its norm's largest
        weight, a value no larger than its weights' length times the input's. e4m3 is as precise over a range of
        thousands: no closer bound is needed, and none that depends on the picture.
        """
        dim, head_dim = norm_scales.shape[-1], self.norm_qk.shape[-1]
        heads = dim // head_dim
        longest = ROUNDING * norm_scales.abs().amax(-1) * dim**0.5
        lengths = row_lengths(self.qkv, 2 * dim, norm_scales.device).unflatten(0, (heads, head_dim)).amax(-1)
        value = longest[:, None] * lengths
        query_key = head_dim**0.5 * self.norm_qk.abs().amax(-1)
        both = query_key[None, :, None].expand(len(value), 2, heads)
        return torch.cat([both, value[:, None]], dim=1) / FP8.largest


def row_lengths(linear: nn.Module, begin: int, device: torch.device) -> torch.Tensor:
    """Lengths of a product's weight rows from ``begin`` on, float32, on the device."""
    weight = linear.get_parameter("weight")[begin:].to(device)  # a streamed one is on the host
    lengths = torch.linalg.vector_norm(weight.float(), dim=-1)
    return lengths * linear.weight_scale[begin:] if isinstance(linear, QuantisedLinear) else lengths


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), w1 and w3 in one product."""

    def __init__(self, config: TransformerConfig, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.form = arithmetic.form
        self.w1w3 = arithmetic.linear(config.dim, 2 * config.hidden_dim)
        self.w2 = arithmetic.linear(config.hidden_dim, config.dim, folded=True)

    def forward(self, h: torch.Tensor | Quantised, ops: Operations) -> torch.Tensor | Scaled:
        return self.w2(ops.swiglu(self.w1w3(h), self.form))


class Block(nn.Module):
    """A transformer block with a norm before and after each of its two halves.

    Takes and returns both the residual stream x and h, the normed and scaled input of the next product, because
    adding to x and norming it for what follows is one pass over memory.
    """

    def __init__(self, config: TransformerConfig, modulated: bool, arithmetic: Arithmetic = PLAIN) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.form = arithmetic.form
        """Of the h that it takes."""
        self.attention = SelfAttention(config, arithmetic)
        self.feed_forward = FeedForward(config, arithmetic)
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
        h: torch.Tensor | Quantised,
        modulation: BlockModulation,
        following: tuple[torch.Tensor, Format | None] | None,
        rope: RotaryTable,
        ops: Operations,
        attend: Attends,
        keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | Quantised]:
        """``following``: the next block's norm scale and the form of the h that it takes; None after the last one.

        ``keep`` drops all but the first tokens on the way, where nothing later reads the others.
        """
        update = self.attention(h, rope, ops, attend, keep, modulation.attention_input)
        x = x[:, :keep]
        x, h = ops.add_gated_norm(x, update, modulation.attention_gate, modulation.ffn_scale, self.eps, self.form)
        scale, form = following or (None, None)
        return ops.add_gated_norm(x, self.feed_forward(h, ops), modulation.ffn_gate, scale, self.eps, form)


class Transformer(nn.Module):
    """Velocity prediction: image latents and a refined caption in, latents' velocity out."""

    def __init__(
        self,
        config: TransformerConfig,
        ops: Operations,
        attend: Attend,
        arithmetic: Arithmetic = PLAIN,
        attend_fp8: AttendFp8 | None = None,
    ) -> None:
        """``attend_fp8``: attention of the noise refiner and the main blocks, instead of ``attend``."""
        super().__init__()
        self.attend_fp8 = attend_fp8
        self.dtype = arithmetic.dtype
        self.stream: BlockStream | None = None
        self.caption_stream: BlockStream | None = None
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
        self.noise_refiner = nn.ModuleList(Block(config, True, arithmetic) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config, True, arithmetic.of_layer(n)) for n in range(config.n_layers))
        self.final_modulation = Linear(config.adaLN_width, config.dim)
        self.final_linear = Linear(config.dim, patch_dim)

    def stream_blocks(self, device: torch.device) -> Callable[[nn.Module, str, torch.Tensor], torch.Tensor]:
        """Have the large weights of all blocks in host memory, to come one block at a time.

        Returns what is to be told of each tensor when it is loaded (see loading.assign).
        """
        self.stream = stream = BlockStream([*self.noise_refiner, *self.layers], device, self.dtype)
        self.caption_stream = captions = BlockStream([*self.context_refiner], device, self.dtype, passing=True)

        def place(owner: nn.Module, leaf: str, value: torch.Tensor) -> torch.Tensor:
            return (captions if captions.holds(owner) else stream).place(owner, leaf, value)

        return place

    def modulation(self, embedded_times: torch.Tensor) -> list[StepModulation]:
        """What each step's time does to the network; embedded_times [steps, FREQUENCIES] (see ``embed_times``).

        Computed in float32 from the stored weights: it is done once a schedule, and its rounding would touch
        every token of every step. Products fill one tensor that the rest then works on as a whole: few launches, and
        few kernels to load in the seconds before the first picture.
        """
        adaln_input = self.adaLN_input(embedded_times)
        modulated = blocks_of(self.noise_refiner) + blocks_of(self.layers)
        factors = modulation_of(modulated, adaln_input, self.ops)
        final = self._linear_float32(self.final_modulation, F.silu(adaln_input)).add_(1)
        if self.attend_fp8 is None:
            return [StepModulation(*step) for step in zip(factors.unbind(1), final.unbind(0))]
        scales = attention_scales(modulated, factors)
        return [StepModulation(*step) for step in zip(factors.unbind(1), final.unbind(0), scales.unbind(1))]

    def adaLN_input(self, embedded_times: torch.Tensor) -> torch.Tensor:
        """Features [steps, adaLN_width] float32 of each step's time, from which blocks make their scales and gates."""
        hidden = F.silu(self._linear_float32(self.t_embedder_in, embedded_times))
        return self._linear_float32(self.t_embedder_out, hidden)

    def _linear_float32(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear_float32(x, linear.weight, linear.bias)

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
        return self.run(self.context_refiner, x, vectors, rope)

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
        x = self.run(self.noise_refiner, self.embed_image(latents), vectors[:refiners], image_rope, None, 0)
        x = torch.cat([x, caption], dim=1)
        tokens = height * width // PATCH**2
        x = self.run(self.layers, x, vectors[refiners:], unified_rope, tokens, refiners)
        return self.unembed(x, modulation.final, height, width)

    def embed_image(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to tokens [batch, padded_length, dim], channels last within a patch, padding tokens behind."""
        return embed_patches(latents, self.x_embedder, self.x_pad_token)

    def unembed(self, tokens: torch.Tensor, scale: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Final layer norm, scale and product, then tokens back to latents, float32."""
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:], scale, None, FINAL_NORM_EPS).to(tokens.dtype)
        patches = self.final_linear(normed).float()
        grid = patches.view(len(tokens), height // PATCH, width // PATCH, PATCH, PATCH, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)

    def run(
        self,
        blocks: nn.ModuleList,
        x: torch.Tensor,
        vectors: list[BlockModulation],
        rope: RotaryTable,
        keep: int | None = None,
        number: int = 0,
        hints: Hints | None = None,
    ) -> torch.Tensor:
        """All blocks in turn; of the last one only the first ``keep`` tokens, where given. x may be overwritten.

        ``number``: of the first block among those that are streamed together.
        """
        if not vectors:
            return x[:, :keep]
        members = blocks_of(blocks)
        stream = self.caption_stream if blocks is self.context_refiner else self.stream
        h = self.ops.scaled_rms_norm(x, vectors[0].attention_scale, self.config.norm_eps, members[0].form)
        following = [(vector.attention_scale, block.form) for vector, block in zip(vectors[1:], members[1:])]
        for step, (block, vector, then) in enumerate(zip(members, vectors, [*following, None])):
            attend = self.attend if vector.attention_input is None else self.attend_fp8
            hinted = hints is not None and step in hints.places
            with present(stream, number + step):
                last = then is None
                x, h = block(x, h, vector, None if hinted else then, rope, self.ops, attend, keep if last else None)
            if hints is not None and hinted:
                x = hints.add(x)
                h = x if then is None else self.ops.scaled_rms_norm(x, then[0], self.config.norm_eps, then[1])
        return x


def present(stream: BlockStream | None, number: int) -> AbstractContextManager[None]:
    """While a block's weights are on the device."""
    return contextlib.nullcontext() if stream is None else stream.block(number)


def embed_patches(latents: torch.Tensor, embedder: Linear, pad_token: torch.Tensor) -> torch.Tensor:
    """Latents [batch, channels, height, width] to tokens [batch, padded_length, dim], the padding token behind."""
    batch, channels, height, width = latents.shape
    patches = latents.to(embedder.weight.dtype).view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    tokens = embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    missing = padded_length(tokens.shape[1]) - tokens.shape[1]
    if missing:
        tokens = torch.cat([tokens, pad_token.expand(batch, missing, -1)], dim=1)
    return tokens


def modulation_of(blocks: Sequence[Block], adaln_input: torch.Tensor, ops: Operations) -> torch.Tensor:
    """Scales and gates [blocks, steps, 4, dim] float32 of blocks, in BlockModulation's order, norms multiplied in."""
    raw = adaln_input.new_empty(len(blocks), len(adaln_input), 4 * len(blocks[0].attention_norm1))
    for block, out in zip(blocks, raw):
        linear = block.adaLN()
        ops.linear_float32(adaln_input, linear.weight, linear.bias, out)
    factors = raw.unflatten(-1, (4, -1))
    factors[:, :, 0::2].add_(1)
    factors[:, :, 1::2].tanh_()
    return factors.mul_(norms_of(blocks)[:, None])


def attention_scales(blocks: Sequence[Block], factors: torch.Tensor) -> torch.Tensor:
    """[blocks, steps, 3, heads]: see SelfAttention.input_scales; factors as ``modulation_of`` gives them."""
    return torch.stack([block.attention.input_scales(own[:, 0]) for block, own in zip(blocks, factors)])


def blocks_of(modules: nn.ModuleList) -> list[Block]:
    """The list's members with their type."""
    return cast("list[Block]", list(modules))


def norms_of(blocks: Sequence[Block]) -> torch.Tensor:
    """Learned norm weights [blocks, 4, dim] float32, in BlockModulation's order."""
    return torch.stack([norm for block in blocks for norm in block.norms()]).float().unflatten(0, (-1, 4))


def embed_times(times: torch.Tensor, t_scale: float) -> torch.Tensor:
    """Sinusoids [steps, FREQUENCIES] of times [steps] float32, 0 (noise) .. 1 (picture), on the CPU."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32) / half
    angles = (times * t_scale)[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
