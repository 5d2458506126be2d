"""The decoder half of the autoencoder (FLUX's), in the published weights' names.

Arithmetic follows diffusers' AutoencoderKL.decode. Tensors are kept channels-last, which cuDNN's and oneDNN's
convolutions want.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Conv2d, Linear

NORM_EPS = 1e-6
CHANNEL_MULTIPLE = 8
SCORE_ROWS = 4096
"""Rows of attention scores computed at a time: 0.27 GB at 1024x1024."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """The fields of the published ``vae/config.json`` that decide encoder and decoder."""

    latent_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool
    use_post_quant_conv: bool
    use_quant_conv: bool

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read a config.json. Raises ValueError for a variant that this module does not compute."""
        blocks = len(config["block_out_channels"])
        only = {"act_fn": "silu", "up_block_types": ["UpDecoderBlock2D"] * blocks}
        only |= {"down_block_types": ["DownEncoderBlock2D"] * blocks}
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
            use_quant_conv=config.get("use_quant_conv", True),
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

    def forward(self, x: torch.Tensor, before: torch.Tensor | None = None, in_place: bool = False) -> torch.Tensor:
        """``before`` [channels] is added first; with ``in_place`` x may be overwritten."""
        return self.ops.group_norm_silu(
            x, self.groups, self.weight, self.bias, NORM_EPS, self.silu, before=before, in_place=in_place
        )


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions behind group norm and SiLU, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = GroupNorm(groups, channels_in, ops)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels_out, ops)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x may be overwritten."""
        later = self.ops.FUSES_BIAS
        residual, bias = x, self.conv2.bias
        if self.conv_shortcut is not None:
            residual = convolve(self.conv_shortcut, x, with_bias=not later)
            bias = sum_of(bias, self.conv_shortcut.bias) if later else bias
        x = self.norm1(x, in_place=residual is not x)
        x = convolve(self.conv1, x, with_bias=not later)
        x = self.norm2(x, before=self.conv1.bias if later else None, in_place=True)
        x = convolve(self.conv2, x, with_bias=not later)
        return self.ops.add_bias_residual(x, present(bias), residual) if later else x.add_(residual)


def convolve(conv: nn.Conv2d, x: torch.Tensor, with_bias: bool) -> torch.Tensor:
    """The convolution, its bias left to a later operation if asked."""
    return F.conv2d(x, conv.weight, conv.bias if with_bias else None, padding=conv.padding)


def sum_of(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor:
    """Two biases added up in float32."""
    return present(first).float() + present(second).float()


def present(bias: torch.Tensor | None) -> torch.Tensor:
    """A bias that is known to exist."""
    assert bias is not None
    return bias


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


class Upsampler(Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution, with 4/9 of the multiplications and no doubled input.

    Each of the four pixels that a pixel becomes sees only 2x2 different inputs: where the 3x3 kernel lies on copies
    of one pixel, its weights are added up beforehand. A 2x2 convolution computes two of the four.
    """

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ops = ops
        self._phases: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._phases is None:
            self._phases = self.phases()
        shape = (len(x), self.out_channels, 2 * x.shape[2], 2 * x.shape[3])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        # Position (i, j) of a product sees inputs (i - 1, j - 1) to (i, j). Even rows, then odd ones: half the memory.
        for row, kernel in enumerate(self._phases):
            self.ops.interleave(F.conv2d(x, kernel, padding=1), present(self.bias), row, out)
        return out

    def phases(self) -> list[torch.Tensor]:
        """The 2x2 kernels [2 * channels, channels, 2, 2] of even and of odd rows: those of even and of odd columns."""
        kernels = []
        for row in range(2):
            rows = fold(self.weight.float(), 2, row)
            folded = torch.cat([fold(rows, 3, column) for column in range(2)])
            kernels.append(folded.to(self.weight.dtype).contiguous(memory_format=torch.channels_last))
        return kernels


def fold(kernel: torch.Tensor, dim: int, phase: int) -> torch.Tensor:
    """Three taps along ``dim`` to the two that a pixel's first (0) or second (1) copy sees."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([first, second + third] if phase == 0 else [first + second, third], dim)


class FewChannels(Conv2d):
    """A convolution to three channels, which on a GPU computes CHANNEL_MULTIPLE and drops the others.

    cuDNN's tensor core kernels take channels in multiples of 8 (NVIDIA's cuDNN documentation, legacy API, "Tensor Core
    operations"). Three mean slower kernels, and a search for one that takes them the first time.
    """

    _padded: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve_padded(x) if x.is_cuda else super().forward(x)

    def convolve_padded(self, x: torch.Tensor) -> torch.Tensor:
        """The same values, by way of more channels; channels last."""
        if self._padded is None:
            missing = -self.out_channels % CHANNEL_MULTIPLE
            weight = F.pad(self.weight, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
            self._padded = weight, F.pad(present(self.bias), (0, missing))
        wide = self._conv_forward(x, *self._padded)
        return wide[:, : self.out_channels].contiguous(memory_format=torch.channels_last)


class UpBlock(nn.Module):
    """Residual blocks, then twice the resolution except in the last block."""

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, ops: Operations, up: bool
    ) -> None:
        super().__init__()
        inputs = [channels_in] + [channels_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, channels_out, groups, ops) for c in inputs)
        self.upsampler = Upsampler(channels_out, ops) if up else None

    def layers(self) -> list[nn.Module]:
        """What is applied one after the other."""
        return [*self.resnets] if self.upsampler is None else [*self.resnets, self.upsampler]


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
        self.conv_out = FewChannels(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width], about -1..1, of the transformer's (scaled) latents float32."""
        # Only the layer that works on a tensor holds it: at 1024x1024 each one kept longer is up to half a gigabyte.
        held = [self.unscale(latents)]
        for layer in self.layers():
            held.append(layer.forward(held.pop()))  # calling the module itself would hold its argument
        return held.pop()

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """The first layer's input: the transformer's latents as the autoencoder has them, in the weights' dtype."""
        unscaled = latents / self.config.scaling_factor + self.config.shift_factor
        return unscaled.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)

    def layers(self) -> list[nn.Module]:
        """What is applied one after the other."""
        layers: list[nn.Module] = [] if self.post_quant_conv is None else [self.post_quant_conv]
        layers += [self.conv_in, self.mid_resnets[0]]
        layers += [self.mid_attention] if self.mid_attention is not None else []
        layers += [self.mid_resnets[1]]
        for block in self.up_blocks:
            layers += cast("UpBlock", block).layers()
        return [*layers, self.conv_norm_out, self.conv_out]

    def rehearse(self, height: int, width: int) -> Iterator[None]:
        """Run every kind of layer once, one at each ``next``, as for latents of height x width, on memory as it comes.

        What cuDNN plans and CUDA loads for a layer is then there when a picture needs it. Nothing is kept from one
        layer to the next, so that this takes no more memory than decoding does.
        """
        weight = self.conv_in.weight
        shape = self.unscale(weight.new_zeros(1, self.config.latent_channels, height, width, dtype=torch.float32)).shape
        results: dict[tuple[object, ...], torch.Size] = {}
        for layer in self.layers():
            kind = (type(layer), *(parameter.shape for parameter in layer.parameters()), shape)
            if kind not in results:
                results[kind] = layer.forward(
                    torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
                ).shape
                yield
            shape = results[kind]
