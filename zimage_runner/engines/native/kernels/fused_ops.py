"""The operations of ``torch_ops`` as GPU kernels: one pass over memory each, statistics in float32.

Block sizes are fixed, not tuned, so that a kernel depends on the model's widths and not on the picture's size: those
of the published models come compiled with the package (``prebuilt``), others are compiled by Triton when first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zimage_runner.engines.native.kernels.launch import kernel
from zimage_runner.engines.native.quantised import FP8, Format, Quantised, Scaled, rotation_group

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


def scaled_rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float, into: Format | None = None) -> Any:
    """See torch_ops."""
    x = x.contiguous()
    dim = x.shape[-1]
    grid, block = (x.numel() // dim,), next_power_of_2(dim)
    if into is not None and not into.rotates:
        out = _empty_quantised(x.shape, into, x.device)
        kernel("scaled_rms_norm_quantised")[grid](
            x, scale, *out, dim, eps, **_constants(into), BLOCK=block, num_warps=_warps(block)
        )
        return out
    plain = torch.empty_like(x)
    kernel("scaled_rms_norm")[grid](x, scale, plain, dim, eps, BLOCK=block, num_warps=_warps(block))
    return product_input(plain, into)


def add_gated_norm(
    x: torch.Tensor,
    update: torch.Tensor | Scaled,
    gate: torch.Tensor,
    next_scale: torch.Tensor | None,
    eps: float,
    into: Format | None = None,
) -> tuple[torch.Tensor, Any]:
    """See torch_ops. Overwrites x."""
    x = x.contiguous()
    dim = x.shape[-1]
    grid, block = (x.numel() // dim,), next_power_of_2(dim)
    norm, fused = next_scale is not None, into is not None and not into.rotates
    scaled = isinstance(update, Scaled)
    raw, row, column = (update.raw, update.row, update.column) if isinstance(update, Scaled) else (update, gate, gate)
    scale = gate if next_scale is None else next_scale  # any pointer will do where nothing is read
    h = torch.empty_like(x) if norm and not fused else x
    if not scaled and not (norm and fused):
        kernel("add_gated_norm")[grid](
            x, raw.contiguous(), gate, scale, h, dim, eps, NORM=norm, BLOCK=block, num_warps=_warps(block)
        )
        return x, product_input(h, into) if norm else h
    out = _empty_quantised(x.shape, into, x.device) if norm and fused and into is not None else (h, gate)
    kernel("add_gated_norm_quantised")[grid](
        x, raw.contiguous(), row, column, gate, scale, *out, dim, eps,
        SCALED=scaled, NORM=norm, QUANTISED=norm and fused, **_constants(into), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    if isinstance(out, Quantised):
        return x, out
    return x, product_input(h, into) if norm else h


def product_input(x: torch.Tensor, into: Format | None) -> Any:
    """See torch_ops."""
    if into is None:
        return x
    x = x.contiguous()
    dim = x.shape[-1]
    grid, out = (x.numel() // dim,), _empty_quantised(x.shape, into, x.device)
    if into.rotates:
        group = rotation_group(dim)
        groups, rest = _two_pieces(dim // group)
        kernel("rotate_quantise")[grid](
            x, *out, dim, **_constants(into),
            GROUPS=groups, REST=rest, GROUP=group, STAGES=group.bit_length() - 1, num_warps=2 * _warps(groups * group),
        )  # fmt: skip
    else:
        block = next_power_of_2(dim)
        kernel("quantise")[grid](x, *out, dim, **_constants(into), BLOCK=block, num_warps=_warps(block))
    return out


def qk_norm_rope(
    qkv: torch.Tensor | Scaled, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See torch_ops. Works within qkv; the three results are views of it."""
    qkv = _rescaled(qkv).contiguous()
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


def qk_norm_rope_quantised(
    qkv: torch.Tensor | Scaled,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See torch_ops."""
    qkv = _rescaled(qkv).contiguous()
    batch, tokens, width = qkv.shape
    head_dim = weight.shape[-1]
    heads = width // 3 // head_dim
    out = torch.empty(qkv.shape, dtype=FP8.dtype, device=qkv.device)
    kernel("qk_norm_rope_quantised")[(batch * tokens, 3)](
        qkv, weight, cos, sin, scales, out, tokens, heads, eps,
        HEADS=next_power_of_2(heads), HEAD_DIM=head_dim, PAIRS=next_power_of_2(head_dim // 2),
        num_warps=4,
    )  # fmt: skip
    query, key, value = out.view(batch, tokens, 3, heads, head_dim).unbind(2)
    return query, key, value


def swiglu(w1w3: torch.Tensor | Scaled, into: Format | None = None) -> Any:
    """See torch_ops."""
    w1w3 = _rescaled(w1w3).contiguous()
    hidden = w1w3.shape[-1] // 2
    shape, rows = (*w1w3.shape[:-1], hidden), w1w3.numel() // (2 * hidden)
    if into is not None and not into.rotates:
        result = _empty_quantised(shape, into, w1w3.device)
        block, rest = _two_pieces(hidden)
        kernel("swiglu_quantised")[(rows,)](
            w1w3, *result, hidden, **_constants(into), BLOCK=block, REST=rest, num_warps=2 * _warps(block)
        )
        return result
    out = w1w3.new_empty(shape)
    grid = (rows, ceil_div(hidden, SWIGLU_BLOCK))
    kernel("swiglu")[grid](w1w3, out, hidden, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return product_input(out, into)


def _rescaled(x: torch.Tensor | Scaled) -> torch.Tensor:
    """See quantised.rescaled."""
    if isinstance(x, torch.Tensor):
        return x
    raw = x.raw.contiguous()
    outputs = raw.shape[-1]
    out = torch.empty(raw.shape, dtype=x.dtype, device=raw.device)
    grid = (raw.numel() // outputs, ceil_div(outputs, SWIGLU_BLOCK))
    kernel("rescale")[grid](raw, x.row, x.column, out, outputs, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def _empty_quantised(shape: Sequence[int], form: Format, device: torch.device) -> Quantised:
    values = torch.empty(shape, dtype=form.dtype, device=device)
    return Quantised(values, torch.empty(values.numel() // shape[-1], dtype=torch.float32, device=device))


def _constants(form: Format | None) -> dict[str, int]:
    """What a kernel has to know of the format; some are compiled without using it."""
    return {"LARGEST": 1 if form is None else int(form.largest)}


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


def _two_pieces(size: int) -> tuple[int, int]:
    """The largest power of two that is no more than ``size``, and one that is no less than what is left."""
    first = next_power_of_2(size // 2 + 1)
    return first, next_power_of_2(max(1, size - first))


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is no less than ``value``."""
    return 1 << (value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)
