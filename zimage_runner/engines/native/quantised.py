"""Eight-bit matrix products of the native engine: what is multiplied, and the layer that multiplies.

Both factors carry one float32 scale a row (see weights/eight_bits.py): weights one for each output feature, made once;
activations one for each token, made for every product.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from zimage_runner.weights.eight_bits import FORMATS, FP8, INT8, Format, quantise_rows, rotation_group, to_format

__all__ = [
    "FORMATS", "FP8", "INT8", "SCALE", "Format", "Quantised", "QuantisedLinear", "Scaled", "quantised", "rescaled",
    "rotation_group", "to_format",
]  # fmt: skip

LARGEST_ERROR = 0.08
"""Relative, of a product of random numbers: e4m3 makes some 0.04 of it, int8 some 0.01."""
SCALE = "weight_scale"
"""The name of a weight's scales beside it, in modules and in files."""


class Quantised(NamedTuple):
    """A product's input: ``values`` [..., features] of eight bits times ``scale`` [rows] float32."""

    values: torch.Tensor
    scale: torch.Tensor


class Scaled(NamedTuple):
    """A product's output [..., outputs] that the next operation has yet to multiply by row's and column's scales."""

    raw: torch.Tensor
    row: torch.Tensor
    """[rows] float32."""
    column: torch.Tensor
    """[outputs] float32."""
    dtype: torch.dtype
    """Of the result."""


def quantised(x: torch.Tensor, form: Format) -> Quantised:
    """x [..., features] in eight bits; the reference for the kernels."""
    values, scale = quantise_rows(x, form)
    return Quantised(values, scale.flatten())


class QuantisedLinear(nn.Module):
    """A product without bias of eight-bit factors."""

    def __init__(self, inputs: int, outputs: int, form: Format, dtype: torch.dtype, folded: bool) -> None:
        """``dtype``: of the result. ``folded``: the operation that follows applies the scales (see Scaled)."""
        super().__init__()
        self.form, self.dtype, self.folded = form, dtype, folded
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=form.dtype), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(outputs, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Quantised) -> torch.Tensor | Scaled:
        values = x.values.flatten(0, -2)
        if self.form is INT8:  # exact sums; there is no product that scales them on the way
            return self._scaled(torch._int_mm(values, self.weight.t()), x)  # pyright: ignore[reportPrivateImportUsage]
        if self.folded:
            one = _one(values.device)
            return self._scaled(self._fp8_product(values, one, one), x)
        return self._shaped(self._fp8_product(values, x.scale[:, None], self.weight_scale[None]), x)

    def _scaled(self, product: torch.Tensor, x: Quantised) -> Scaled:
        return Scaled(self._shaped(product, x), x.scale, self.weight_scale, self.dtype)

    def _shaped(self, product: torch.Tensor, x: Quantised) -> torch.Tensor:
        return product.view(*x.values.shape[:-1], -1)

    def _fp8_product(self, values: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if not values.is_cuda:
            return ((values.float() @ self.weight.float().t()) * row * column).to(self.dtype)
        # Without fast accumulation Hopper adds up in float32 every few products, at half the speed.
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            values, self.weight.t(), scale_a=row, scale_b=column, out_dtype=self.dtype, use_fast_accum=True
        )

    def take(self, weight: torch.Tensor) -> None:
        """Round a weight [outputs, inputs] of more bits."""
        values, scale = quantise_rows(weight, self.form)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)


@cache
def _one(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


def rescaled(x: torch.Tensor | Scaled, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A product's output with its scales applied, in ``dtype`` or the product's own; the reference for the kernels."""
    if isinstance(x, torch.Tensor):
        return x
    rows = x.raw.flatten(0, -2).float() * x.row[:, None] * x.column
    return rows.to(dtype or x.dtype).view(x.raw.shape)


def try_product(precision: str) -> str | None:
    """Why this machine's GPU does not multiply in this precision; None if a small product is right."""
    form = FORMATS[precision]
    generator = torch.Generator("cuda").manual_seed(0)
    weight, x = (torch.randn(64, 64, device="cuda", generator=generator) for _ in range(2))
    expected = x @ weight.t()
    for folded in (True, False):
        linear = QuantisedLinear(64, 64, form, torch.bfloat16, folded)
        linear.take(weight)
        try:
            got = rescaled(linear(quantised(x, form))).float()
        except (RuntimeError, AttributeError) as error:
            return " ".join(str(error).split())[:200]
        difference = ((got - expected).norm() / expected.norm()).item()
        if not difference < LARGEST_ERROR:  # NaN must not pass
            return f"its result is off by {difference:.3g}"
    return None
