"""The packed product: the same numbers as the plain one, and only where it pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zimage_runner.engines.native import layers
from zimage_runner.engines.native.layers import PackedLinear, can_pack


def linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> PackedLinear:
    module = PackedLinear(columns, rows, bias=False)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    module.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return module


@pytest.mark.parametrize(("rows", "columns"), [(864, 288), (288, 768), (5, 7)])
def test_any_number_of_tokens_after_the_first_call(rows: int, columns: int) -> None:
    module = linear(rows, columns)
    for shape in ((1, 96), (1, 64), (3, 1), (2, 513)):
        x = torch.randn(*shape, columns + 1, generator=torch.Generator().manual_seed(1))[..., :-1]  # not contiguous
        torch.testing.assert_close(module(x), F.linear(x, module.weight), atol=1e-5, rtol=1e-5)


def test_large_and_bfloat16_weights_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "PACKED_ELEMENTS", 16)
    small, large, half = linear(4, 4), linear(4, 5), linear(4, 4, torch.bfloat16)
    for module in (small, large, half):
        module(torch.ones(2, module.in_features, dtype=module.weight.dtype))
    assert (small._packed is not None) == can_pack(small.weight)
    assert large._packed is None
    assert half._packed is None
