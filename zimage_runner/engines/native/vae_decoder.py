"""The decoder half of the autoencoder (FLUX's), in the published weights' names.

Arithmetic follows diffusers' AutoencoderKL.decode. Tensors are kept channels-last, which cuDNN's and oneDNN's
convolutions want.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Conv2d, Linear

NORM_EPS = 1e-6
SCORE_ROWS = 4096
"""Rows of attention scores computed at a time: 0.27 GB at 1024x1024."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """The fields of the published ``vae/config.json`` that decide the decoder's arithmetic."""

    latent_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool
    use_post_quant_conv: bool

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read a config.json. Raises ValueError for a variant that this module does not compute."""
        blocks = len(config["block_out_channels"])
        only = {"act_fn": "silu", "up_block_types": ["UpDecoderBlock2D"] * blocks}
        for name, value in only.items():
            if config.get(name, value) != value:
                raise ValueError(f"vae/config.json: {name}={config[name]!r} is not supported, only {value!r}")
        return cls(
            latent_channels=config["latent_channels"],
            out_channels=config.get("out_channels", 3),
            block_out_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            norm_num_groups=config["norm_num_groups"],
            scaling_factor=config["scaling_factor"],
            shift_factor=config.get("shift_factor") or 0.0,
            mid_block_add_attention=config.get("mid_block_add_attention", True),
            use_post_quant_conv=config.get("use_post_quant_conv", True),
        )

    @property
    def scale(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.Module):
    """Group norm, then SiLU unless told otherwise."""

    def __init__(self, groups: int, channels: int, ops: Operations, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.ops, self.silu = groups, ops, silu
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.group_norm_silu(x, self.groups, self.weight, self.bias, NORM_EPS, self.silu)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions behind group norm and SiLU, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, ops: Operations) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, ops)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels_out, ops)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))).add_(residual)


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, groups: int, ops: Operations) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, ops, silu=False)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.to_qkv(tokens).chunk(3, dim=-1)
        attend = wide_attention if x.is_cuda else F.scaled_dot_product_attention
        out = self.to_out(attend(query, key, value))
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])


def wide_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head as wide as all channels, [batch, tokens, channels]: scores in float32, rows in chunks.

    512 channels are more than the fast attention kernels take, and the general one is several times slower than
    two matrix products.
    """
    scale = query.shape[-1] ** -0.5
    out = torch.empty_like(query)
    for picture in range(len(query)):
        keys = key[picture].t()
        for rows, result in zip(query[picture].split(SCORE_ROWS), out[picture].split(SCORE_ROWS)):
            if rows.dtype == torch.float32:
                scores = rows @ keys
            else:
                scores = torch.mm(rows, keys, out_dtype=torch.float32)
            result.copy_(scores.mul_(scale).softmax(-1).to(value.dtype) @ value[picture])
    return out


class UpBlock(nn.Module):
    """Residual blocks, then twice the resolution except in the last block."""

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, ops: Operations, up: bool
    ) -> None:
        super().__init__()
        inputs = [channels_in] + [channels_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, channels_out, groups, ops) for c in inputs)
        self.upsampler = Conv2d(channels_out, channels_out, 3, padding=1) if up else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsampler is None:
            return x
        return self.upsampler(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VaeDecoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VaeConfig, ops: Operations) -> None:
        super().__init__()
        self.config = config
        channels = list(reversed(config.block_out_channels))
        groups, last = config.norm_num_groups, len(channels) - 1
        quant = config.latent_channels
        self.post_quant_conv = Conv2d(quant, quant, 1) if config.use_post_quant_conv else None
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_resnets = nn.ModuleList(ResnetBlock(channels[0], channels[0], groups, ops) for _ in range(2))
        self.mid_attention = AttentionBlock(channels[0], groups, ops) if config.mid_block_add_attention else None
        self.up_blocks = nn.ModuleList(
            UpBlock(channels[max(i - 1, 0)], channels[i], config.layers_per_block + 1, groups, ops, up=i < last)
            for i in range(len(channels))
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], ops)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width], about -1..1, of the transformer's (scaled) latents float32."""
        unscaled = latents / self.config.scaling_factor + self.config.shift_factor
        x = unscaled.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        x = self.mid_resnets[0](self.conv_in(x))
        if self.mid_attention is not None:
            x = self.mid_attention(x)
        x = self.mid_resnets[1](x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))
