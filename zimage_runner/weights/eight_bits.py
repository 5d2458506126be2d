"""Numbers of eight bits: the formats, a row's scale, rounding. The reference for kernels and for files of weights.

A row's scale maps its largest magnitude to the format's largest number, so that an outlier costs its own row precision
and no other. ``FP8`` is e4m3, a floating point number of 3 mantissa bits. ``INT8`` rotates groups of 256 inputs by a
Hadamard matrix first (both factors of a product, so that it stays the same), which spreads an outlier over its group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOOR = 1e-12
"""Least largest magnitude of a row: a row of zeros must not be divided by zero."""
LARGEST_GROUP = 256


@dataclass(frozen=True, slots=True)
class Format:
    """A format of eight bits."""

    name: str
    dtype: torch.dtype
    largest: float
    rotates: bool = False


FP8 = Format("fp8", torch.float8_e4m3fn, 448.0)
INT8 = Format("int8", torch.int8, 127.0, rotates=True)
FORMATS = {form.name: form for form in (FP8, INT8)}


def quantise_rows(x: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [..., features] rounded to eight bits, scales [...] float32): values times scales are about x."""
    x = rotate(x) if form.rotates else x.float()
    scale = row_scale(x.abs().amax(-1), form)
    return to_format(x * (1 / scale)[..., None], form), scale


def round_rows(x: torch.Tensor, scale: torch.Tensor, form: Format) -> torch.Tensor:
    """The same with scales that are known."""
    x = rotate(x) if form.rotates else x.float()
    return to_format(x * (1 / scale)[..., None], form)


def row_scale(largest: torch.Tensor, form: Format) -> torch.Tensor:
    """Scales of rows whose largest magnitudes these are."""
    return largest.float().clamp(min=FLOOR) / form.largest


def to_format(scaled: torch.Tensor, form: Format) -> torch.Tensor:
    """Round to nearest even what is within the format's range, but for rounding."""
    limited = scaled.clamp(-form.largest, form.largest)
    return (limited if form.dtype.is_floating_point else limited.round()).to(form.dtype)


def rotation_group(features: int) -> int:
    """Inputs that are rotated together: the largest power of two, at most 256, that divides their number."""
    return min(LARGEST_GROUP, features & -features)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Each group of inputs [..., features] times the orthonormal Hadamard matrix (Sylvester's order), float32."""
    group = rotation_group(x.shape[-1])
    out, half = x.float().unflatten(-1, (-1, group)), 1
    while half < group:
        pairs = out.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        out = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return out.flatten(-2) * group**-0.5
