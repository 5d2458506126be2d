"""The Triton kernels compute what plain PyTorch does: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.triton_interpreter import DEVICE, randn  # before the kernels
from zimage_runner.engines.native.kernels import choose_operations, fused_ops, torch_ops

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
"""bfloat16: two units in the last place of values up to 2, for both sides round once."""


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("dim", [288, 256])
def test_scaled_rms_norm(dtype: torch.dtype, dim: int) -> None:
    x, scale = randn(2, 3, dim, dtype=dtype), randn(dim, seed=1)
    close(fused_ops.scaled_rms_norm(x, scale, 1e-5), torch_ops.scaled_rms_norm(x, scale, 1e-5))


@pytest.mark.parametrize("last", [False, True])
def test_add_gated_norm(dtype: torch.dtype, last: bool) -> None:
    x, update = randn(2, 3, 288, dtype=dtype), randn(2, 3, 288, seed=1, dtype=dtype)
    gate, scale = randn(288, seed=2), None if last else randn(288, seed=3)
    expected = torch_ops.add_gated_norm(x.clone(), update, gate, scale, 1e-5)
    for got, wanted in zip(fused_ops.add_gated_norm(x, update, gate, scale, 1e-5), expected):
        close(got, wanted)


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 48), (4, 32), (3, 128)])
def test_qk_norm_rope(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    qkv, weight = randn(2, 5, 3 * heads * head_dim, dtype=dtype), randn(2, head_dim, seed=1)
    angles = randn(5, head_dim // 2, seed=2)
    expected = torch_ops.qk_norm_rope(qkv.clone(), weight, angles.cos(), angles.sin(), 1e-5)
    for got, wanted in zip(fused_ops.qk_norm_rope(qkv, weight, angles.cos(), angles.sin(), 1e-5), expected):
        close(got, wanted)


@pytest.mark.parametrize(("features", "outputs"), [(256, 96), (1024, 256), (48, 40)])
@pytest.mark.parametrize("filled", [False, True])
def test_linear_float32(dtype: torch.dtype, features: int, outputs: int, filled: bool) -> None:
    x, weight = randn(3, features), randn(outputs, features, seed=1, dtype=dtype) / features**0.5
    bias = randn(outputs, seed=2, dtype=dtype)
    expected = torch_ops.linear_float32(x, weight, bias)
    out = torch.full((3, outputs), torch.nan, device=DEVICE) if filled else None
    got = fused_ops.linear_float32(x, weight, bias, out)
    assert out is None or got is out
    close(got, expected)


@pytest.mark.parametrize("hidden", [96, 2560])
def test_swiglu(dtype: torch.dtype, hidden: int) -> None:
    x = randn(2, 3, 2 * hidden, dtype=dtype)
    close(fused_ops.swiglu(x), torch_ops.swiglu(x))


def pixels(channels: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = (randn(2, channels, height, width, seed=seed) + 0.5).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("silu", "before", "in_place"), [(False, False, False), (True, False, True), (True, True, True)]
)
@pytest.mark.parametrize(("channels", "groups", "side"), [(96, 16, 5), (32, 16, 24), (128, 32, 9)])
def test_group_norm_silu(
    dtype: torch.dtype, channels: int, groups: int, side: int, silu: bool, before: bool, in_place: bool
) -> None:
    x = pixels(channels, side, side + 1, dtype)
    weight, bias = randn(channels, seed=1, dtype=dtype), randn(channels, seed=2, dtype=dtype)
    added = randn(channels, seed=3, dtype=dtype) if before else None
    expected = torch_ops.group_norm_silu(
        x.float(), groups, weight.float(), bias.float(), 1e-6, silu, None if added is None else added.float()
    )
    got = fused_ops.group_norm_silu(x, groups, weight, bias, 1e-6, silu, added, in_place)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.data_ptr() == x.data_ptr()) == in_place
    close(got, expected.to(dtype))


def test_add_bias_residual(dtype: torch.dtype) -> None:
    x, residual, bias = pixels(96, 5, 6, dtype), pixels(96, 5, 6, dtype, seed=1), randn(96, seed=2)
    expected = torch_ops.add_bias_residual(x.float(), bias, residual.float()).to(dtype)
    close(fused_ops.add_bias_residual(x, bias, residual), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (8, 16)])
def test_interleave(dtype: torch.dtype, height: int, width: int) -> None:
    bias = randn(24, seed=1, dtype=dtype)
    got, expected = (torch.full_like(pixels(24, 2 * height, 2 * width, dtype), torch.nan) for _ in range(2))
    for row in range(2):
        phases = pixels(2 * 24, height + 1, width + 1, dtype, seed=row)
        fused_ops.interleave(phases, bias, row, got)
        torch_ops.interleave(phases, bias, row, expected)
    close(got, expected)


def test_no_fused_kernels_without_a_gpu() -> None:
    assert choose_operations("cpu") is torch_ops
    assert choose_operations("cuda", fused=False) is torch_ops
