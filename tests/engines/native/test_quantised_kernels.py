"""The kernels of eight-bit arithmetic compute what plain PyTorch does (see test_kernels.py for where they run)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.triton_interpreter import DEVICE, randn
from zimage_runner.engines.native.kernels import fused_ops, torch_ops
from zimage_runner.engines.native.quantised import FP8, INT8, Format, Quantised, Scaled

if DEVICE == "cpu":
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_as_gpus_do(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        # Triton 3.6's interpreter rounds up to the next power of two without carrying, and cuts off small numbers.
        if target.name != "fp8e4nv":
            return _convert(data, source, target, rounding)
        values = torch.from_numpy(data.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return values.view(torch.uint8).numpy()

    interpreter._convert_float = _convert_as_gpus_do

FORMS = [pytest.param(form, id=form.name) for form in (FP8, INT8)]


def same(got: Quantised, expected: Quantised, form: Format, rounded: bool = False) -> None:
    """Equal but for the order of float32 sums: a neighbour now and then.

    ``rounded``: to bfloat16 before, by two ways that may differ by a neighbour there.
    """
    torch.testing.assert_close(got.scale, expected.scale, rtol=3e-2 if rounded else 1e-5, atol=0)
    assert got.values.dtype == expected.values.dtype == form.dtype
    a, b = got.values.float(), expected.values.float()
    neighbours = torch.ones(()) if form.rotates else b.abs() / 8 + 2**-9
    assert ((a - b).abs() <= neighbours * (4 if rounded and form.rotates else 1)).all()
    assert rounded or (a != b).float().mean() < 0.01


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of zeros among them, one with an outlier of 6.6e4."""
    x = randn(*shape, seed=seed) * (10 ** randn(*shape[:-1], 1, seed=seed + 1))
    x.view(-1, shape[-1])[1] = 0
    x.view(-1, shape[-1])[2, 7] = 6.6e4
    return x.bfloat16()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", [288, 768, 2304])
def test_product_input(form: Format, features: int) -> None:
    x = rows(2, 3, features)
    same(fused_ops.product_input(x, form), torch_ops.product_input(x, form), form)


@pytest.mark.parametrize("form", FORMS)
def test_scaled_rms_norm(form: Format) -> None:
    x, scale = rows(2, 3, 288), randn(288, seed=1)
    same(
        fused_ops.scaled_rms_norm(x, scale, 1e-5, form),
        torch_ops.scaled_rms_norm(x, scale, 1e-5, form),
        form,
        form.rotates,
    )


def product(form: Format, *shape: int) -> Scaled:
    """A product's output that is still to be scaled."""
    raw = 1e4 * randn(*shape, seed=3)
    raw = raw.bfloat16() if form is FP8 else raw.to(torch.int32)
    return Scaled(raw, randn(shape[0] * shape[1], seed=4).abs(), randn(shape[-1], seed=5).abs(), torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("then", ["quantised", "plain", "nothing"])
def test_add_gated_norm(form: Format, scaled: bool, then: str) -> None:
    x, gate, scale = rows(2, 3, 288), randn(288, seed=2), randn(288, seed=6)
    update = product(form, 2, 3, 288) if scaled else rows(2, 3, 288, seed=9)
    next_scale, into = None if then == "nothing" else scale, form if then == "quantised" else None
    expected_x, expected = torch_ops.add_gated_norm(x.clone(), update, gate, next_scale, 1e-5, into)
    got_x, got = fused_ops.add_gated_norm(x.clone(), update, gate, next_scale, 1e-5, into)
    torch.testing.assert_close(got_x, expected_x, atol=1.6e-2, rtol=1.6e-2)
    if into is None:
        torch.testing.assert_close(got, expected, atol=1.6e-2, rtol=1.6e-2)
    else:
        same(got, expected, form, rounded=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hidden", [96, 768, 2560])
def test_swiglu(form: Format, hidden: int) -> None:
    x = rows(2, 3, 2 * hidden)
    same(fused_ops.swiglu(x, form), torch_ops.swiglu(x, form), form, rounded=form.rotates)


def test_scaled_products_before_norms_and_swiglu() -> None:
    w1w3 = product(INT8, 2, 3, 192)
    same(fused_ops.swiglu(w1w3, INT8), torch_ops.swiglu(w1w3, INT8), INT8, rounded=True)
    angles, weight, qkv = randn(3, 24, seed=2), randn(2, 48, seed=1), product(INT8, 2, 3, 3 * 6 * 48)
    expected = torch_ops.qk_norm_rope(qkv, weight, angles.cos(), angles.sin(), 1e-5)
    for got, wanted in zip(fused_ops.qk_norm_rope(qkv, weight, angles.cos(), angles.sin(), 1e-5), expected):
        torch.testing.assert_close(got, wanted, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="the products themselves are the GPU's own")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folded", [False, True])
def test_product(form: Format, folded: bool) -> None:
    from zimage_runner.engines.native.quantised import QuantisedLinear, quantised, rescaled

    linear = QuantisedLinear(256, 96, form, torch.bfloat16, folded)
    weight, x = randn(96, 256, seed=1), quantised(rows(2, 40, 256), form)
    linear.take(weight)
    exact = (x.values.double().flatten(0, 1) * x.scale[:, None].double()) @ (
        linear.weight.double() * linear.weight_scale[:, None].double()
    ).t()
    error = (rescaled(linear(x)).flatten(0, 1).double() - exact).norm(dim=-1)
    assert (error <= 5e-3 * exact.norm(dim=-1)).all()  # bfloat16, and sums of a few bits less than float32's
