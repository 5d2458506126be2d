"""The operations of ``torch_ops`` as GPU kernels: one pass over memory each, statistics in float32.

Block sizes are fixed, not tuned, so that a kernel depends on the model's widths and not on the picture's size: those
of the published models come compiled with the package (``prebuilt``), others are compiled by Triton when first used.
"""

from __future__ import annotations

import torch

from zimage_runner.engines.native.kernels.launch import kernel

FUSES_BIAS: bool = True
"""See torch_ops: cuDNN's convolutions leave the bias to a pass of its own."""
SWIGLU_BLOCK = 2048
LINEAR_FEATURES, LINEAR_OUTPUTS = 256, 32
"""Tile of a small float32 product."""
NORM_TILE = 8192
"""Elements of a group norm tile: rows of all channels."""
NORM_PARTS = 1024
"""Programs that sum up one picture for its group norm."""
PARTS_BLOCK = 256
"""Of these sums, how many are read at a time."""


def scaled_rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """See torch_ops."""
    x = x.contiguous()
    dim = x.shape[-1]
    out = torch.empty_like(x)
    block = next_power_of_2(dim)
    kernel("scaled_rms_norm")[(x.numel() // dim,)](x, scale, out, dim, eps, BLOCK=block, num_warps=_warps(block))
    return out


def add_gated_norm(
    x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, next_scale: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See torch_ops. Overwrites x."""
    x, update = x.contiguous(), update.contiguous()
    dim = x.shape[-1]
    h = x if next_scale is None else torch.empty_like(x)
    block = next_power_of_2(dim)
    kernel("add_gated_norm")[(x.numel() // dim,)](
        x, update, gate, gate if next_scale is None else next_scale, h, dim, eps,
        NORM=next_scale is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return x, h


def qk_norm_rope(
    qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See torch_ops. Works within qkv; the three results are views of it."""
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    head_dim = weight.shape[-1]
    heads = width // 3 // head_dim
    kernel("qk_norm_rope")[(batch * tokens, 2)](
        qkv, weight, cos, sin, tokens, heads, eps,
        HEADS=next_power_of_2(heads), HEAD_DIM=head_dim, PAIRS=next_power_of_2(head_dim // 2),
        num_warps=4,
    )  # fmt: skip
    query, key, value = qkv.view(batch, tokens, 3, heads, head_dim).unbind(2)
    return query, key, value


def swiglu(w1w3: torch.Tensor) -> torch.Tensor:
    """See torch_ops."""
    w1w3 = w1w3.contiguous()
    hidden = w1w3.shape[-1] // 2
    out = w1w3.new_empty((*w1w3.shape[:-1], hidden))
    grid = (out.numel() // hidden, ceil_div(hidden, SWIGLU_BLOCK))
    kernel("swiglu")[grid](w1w3, out, hidden, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def linear_float32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See torch_ops. Reads the weights as they are stored; cuBLAS would load kernels for these few rows alone."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, (outputs, features) = len(x), weight.shape
    if out is None:
        out = torch.empty(rows, outputs, device=x.device, dtype=torch.float32)
    kernel("linear_float32")[(ceil_div(outputs, LINEAR_OUTPUTS), rows)](
        x, weight, bias, out, features, outputs, BLOCK_K=LINEAR_FEATURES, BLOCK_N=LINEAR_OUTPUTS, num_warps=4
    )
    return out


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    before: torch.Tensor | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """See torch_ops. Channels-last in and out."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    rows = height * width
    block_c, block_r = _tile(channels)
    parts = min(NORM_PARTS, ceil_div(rows, block_r))
    rows_per_part = ceil_div(ceil_div(rows, parts), block_r) * block_r
    sums = torch.empty(batch, 2, parts, channels, device=x.device, dtype=torch.float32)
    affine = torch.empty(batch, 2, channels, device=x.device, dtype=torch.float32)
    out = x if in_place else torch.empty_like(x)  # keeps the memory format
    added = weight if before is None else before  # any pointer will do where nothing is added
    has_before = before is not None
    kernel("channel_sums")[(parts, batch)](
        x, added, sums, rows, channels, rows_per_part, parts,
        BEFORE=has_before, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip
    size = channels // groups
    kernel("group_affine")[(groups, batch)](
        sums, added, weight, bias, affine, channels, size, parts, rows * size, eps,
        BEFORE=has_before, BLOCK_P=PARTS_BLOCK, BLOCK_S=next_power_of_2(size),
    )  # fmt: skip
    kernel("apply_affine")[(ceil_div(rows, block_r), batch)](
        x, affine, out, rows, channels, SILU=silu, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8
    )
    return out


def add_bias_residual(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See torch_ops. Overwrites x; channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_c, block_r = _tile(channels)
    kernel("add_bias_residual")[(ceil_div(rows, block_r),)](
        x, bias, residual, rows, channels, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8
    )
    return x


def interleave(phases: torch.Tensor, bias: torch.Tensor, row: int, out: torch.Tensor) -> None:
    """See torch_ops."""
    phases = phases.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = phases.shape
    height, width, channels = height - 1, width - 1, len(bias)
    block_c, block_r = _tile(channels)
    pixels = height * 2 * width
    kernel("interleave")[(ceil_div(pixels, block_r), batch)](
        phases, bias, out, row, pixels, width, (height + 1) * (width + 1), channels,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip


def _tile(channels: int) -> tuple[int, int]:
    """(all channels, rows) of a tile of about NORM_TILE elements."""
    block_c = next_power_of_2(channels)
    return block_c, max(1, NORM_TILE // block_c)


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is no less than ``value``."""
    return 1 << (value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)
