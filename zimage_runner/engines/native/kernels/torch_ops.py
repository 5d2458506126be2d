"""The transformer's elementwise operations in plain PyTorch: the reference, and what runs without Triton.

Every norm's learned weight and the step's modulation are multiplied beforehand into one float32 vector, so that
``rms_norm(x) * weight * (1 + scale)`` is one multiplication. Statistics are taken in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from zimage_runner.engines.native.quantised import FP8, Format, Scaled, quantised, rescaled, to_format

FUSES_BIAS: bool = False
"""Whether a convolution's bias is better added by the operation after it than by the convolution itself."""


def scaled_rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float, into: Format | None = None) -> Any:
    """x / rms(x) * scale. x [..., dim]; scale [dim] float32; result in x's dtype, or in eight bits."""
    return _product_input(_rms_norm(x.float(), scale, eps), x.dtype, into)


def add_gated_norm(
    x: torch.Tensor,
    update: torch.Tensor | Scaled,
    gate: torch.Tensor,
    next_scale: torch.Tensor | None,
    eps: float,
    into: Format | None = None,
) -> tuple[torch.Tensor, Any]:
    """The residual step and the norm that follows it.

    x' = x + update / rms(update) * gate; h = x' / rms(x') * next_scale. x, update [..., dim]; gate, next_scale [dim]
    float32. Returns (x', h), h in x's dtype or in eight bits; h is x' itself without next_scale. x may be overwritten.
    """
    plain = rescaled(update, torch.float32).float()
    x = torch.addcmul(x.float(), normalised(plain, eps), gate).to(x.dtype)
    return x, x if next_scale is None else scaled_rms_norm(x, next_scale, eps, into)


def product_input(x: torch.Tensor, into: Format | None) -> Any:
    """x [..., features] as it is, or in eight bits."""
    return x if into is None else quantised(x, into)


def _product_input(x: torch.Tensor, dtype: torch.dtype, into: Format | None) -> Any:
    """Float32 x in ``dtype`` or in eight bits; to be rotated in a pass of its own, it is rounded to ``dtype`` first."""
    return product_input(x if into is not None and not into.rotates else x.to(dtype), into)


def qk_norm_rope(
    qkv: torch.Tensor | Scaled, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each head of query and key, then rotate its channel pairs (2i, 2i + 1) by the token's angles.

    qkv [batch, tokens, 3 * heads * head_dim]; weight [2, head_dim] float32 (query's, key's);
    cos, sin [tokens, head_dim / 2] float32. Returns query, key, value, each [batch, tokens, heads, head_dim].
    """
    qkv = rescaled(qkv)
    split = qkv.unflatten(-1, (3, -1, weight.shape[-1]))
    query, key, value = split.unbind(2)
    turns = torch.complex(cos, sin)[:, None, :]
    if qkv.is_cuda:
        return _turned(query, weight[0], turns, eps), _turned(key, weight[1], turns, eps), value
    # Together: at the embedded model's size a pass over either costs its call more than its arithmetic.
    query, key = _turned(split[:, :, :2], weight[:, None], turns[:, None], eps).unbind(2)
    return query, key, value


def qk_norm_rope_quantised(
    qkv: torch.Tensor | Scaled,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, query, key and value in e4m3; ``scales`` [3, heads] float32 are theirs."""
    plain = qk_norm_rope(qkv, weight, cos, sin, eps)
    query, key, value = (to_format(x.float() / scale[:, None], FP8) for x, scale in zip(plain, scales))
    return query, key, value


def _turned(x: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., heads, head_dim] normed, then rotated by turns = cos + i sin [..., 1, head_dim / 2]; x's dtype."""
    normed = _rms_norm(x.float(), weight, eps)
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(turns)).flatten(-2).to(x.dtype)


def swiglu(w1w3: torch.Tensor | Scaled, into: Format | None = None) -> Any:
    """silu(w1 x) * (w3 x) of the fused product [..., 2 * hidden]: w1's half first."""
    w1w3 = rescaled(w1w3)
    gate, value = w1w3.chunk(2, dim=-1)
    if w1w3.dtype == torch.float32:
        return product_input(F.silu(gate).mul_(value), into)
    return _product_input(F.silu(gate.float()) * value.float(), w1w3.dtype, into)


def linear_float32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x weight^T + bias, computed in float32 whatever the weights are stored in.

    x [rows, features] float32, few rows; weight [outputs, features]; bias [outputs]; out, if given, takes the result
    [rows, outputs] float32.
    """
    return torch.addmm(bias.float(), x, weight.float().t(), out=out)


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
    """Group norm of x [batch, channels, height, width], then SiLU where asked.

    ``before`` [channels] is added to x first: the bias of the convolution it came from. With ``in_place`` x may be
    overwritten.
    """
    x = x if before is None else x + before[:, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=True) if silu else x


def add_bias_residual(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x + bias + residual; x, residual [batch, channels, height, width], bias [channels]. x may be overwritten."""
    return x.add_(residual).add_(bias[:, None, None])


def interleave(phases: torch.Tensor, bias: torch.Tensor, row: int, out: torch.Tensor) -> None:
    """Write two pictures of one pixel in four, plus bias [channels], to the even (row 0) or odd (1) rows of ``out``.

    phases [batch, 2 * channels, height + 1, width + 1], even columns' channels first; column b of position (i, j) is
    at (i + row, j + b). out [batch, channels, 2 * height, 2 * width], channels last.
    """
    height, width, split = phases.shape[2] - 1, phases.shape[3] - 1, phases.unflatten(1, (2, -1))
    for column in range(2):
        part = split[:, column, :, row : row + height, column : column + width]
        torch.add(part, bias[:, None, None], out=out[:, :, row::2, column::2])


def _rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * scale for float32 x; scale broadcasts."""
    return normalised(x, eps).mul_(scale)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) for float32 x, in memory of its own."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], None, eps)
    # By the vectors' lengths: on the CPU, F.rms_norm is a chain of passes over memory.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(_scalar(eps), length, length, value=1 / x.shape[-1])
    return x * mean_square.rsqrt_()


@cache
def _scalar(value: float) -> torch.Tensor:
    """The number as a tensor on the CPU, made once."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor(value, dtype=torch.float32)
