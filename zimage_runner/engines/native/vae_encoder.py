"""The encoder half of the autoencoder (FLUX's), in the published weights' names.

Arithmetic follows diffusers' AutoencoderKL.encode; layers and layout are those of the decoder.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Conv2d
from zimage_runner.engines.native.vae_decoder import AttentionBlock, GroupNorm, ResnetBlock, VaeConfig
from zimage_runner.engines.request import Posterior

MOST_LOGVAR, LEAST_LOGVAR = 20.0, -30.0
"""Bounds of the logarithm of the variance (diffusers' DiagonalGaussianDistribution)."""


class DownBlock(nn.Module):
    """Residual blocks, then half the resolution except in the last block."""

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, ops: Operations, down: bool
    ) -> None:
        super().__init__()
        inputs = [channels_in] + [channels_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, channels_out, groups, ops) for c in inputs)
        self.downsampler = Conv2d(channels_out, channels_out, 3, stride=2) if down else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x may be overwritten."""
        for resnet in self.resnets:
            x = resnet.forward(x)
        # Padded at the right and at the bottom alone.
        return x if self.downsampler is None else self.downsampler(F.pad(x, (0, 1, 0, 1)))


class VaeEncoder(nn.Module):
    """Pixels to the latents' distribution."""

    def __init__(self, config: VaeConfig, ops: Operations) -> None:
        super().__init__()
        self.config = config
        channels, groups = config.block_out_channels, config.norm_num_groups
        last, latents = len(channels) - 1, config.latent_channels
        self.conv_in = Conv2d(config.out_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], channels[i], config.layers_per_block, groups, ops, down=i < last)
            for i in range(len(channels))
        )
        self.mid_resnets = nn.ModuleList(ResnetBlock(channels[-1], channels[-1], groups, ops) for _ in range(2))
        self.mid_attention = AttentionBlock(channels[-1], groups, ops) if config.mid_block_add_attention else None
        self.conv_norm_out = GroupNorm(groups, channels[-1], ops)
        self.conv_out = Conv2d(channels[-1], 2 * latents, 3, padding=1)
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None

    def forward(self, pixels: torch.Tensor) -> Posterior:
        """The distribution of the transformer's (scaled) latents of pixels [height, width, 3] of 0 to 255.

        Computed in the weights' dtype, on their device; the result is float32 on the CPU.
        """
        weight = self.conv_in.weight
        x = pixels.to(weight.device).permute(2, 0, 1)[None].float().div(127.5).sub_(1)
        x = self.conv_in(x.to(weight.dtype).contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = cast("DownBlock", block).forward(x)
        x = cast("ResnetBlock", self.mid_resnets[0]).forward(x)
        x = x if self.mid_attention is None else self.mid_attention(x)
        x = cast("ResnetBlock", self.mid_resnets[1]).forward(x)
        x = self.conv_out(self.conv_norm_out(x))
        x = x if self.quant_conv is None else self.quant_conv(x)
        mean, logvar = x[0].float().cpu().chunk(2)
        std = logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR).mul(0.5).exp()
        scale, shift = self.config.scaling_factor, self.config.shift_factor
        return Posterior(((mean - shift) * scale).contiguous(), (std * scale).contiguous())
