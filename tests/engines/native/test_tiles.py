"""Overlapping tiles: they cover the picture, overlap enough, and agree with the whole where each tile does."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.engines.native.tiles import OVERLAP, in_tiles, starts
from zimage_runner.engines.request import draw_noises, mixed_noise


@given(tile=st.integers(4, 32).map(lambda n: 2 * n), length=st.integers(2, 200).map(lambda n: 2 * n))
def test_tiles_cover_a_side(tile: int, length: int) -> None:
    places = starts(length, tile)
    assert places[0] == 0
    assert places[-1] + tile >= length
    assert all(place >= 0 and place % 2 == 0 for place in places)
    steps = [second - first for first, second in itertools.pairwise(places)]
    assert all(0 < step <= tile - tile // OVERLAP + 2 for step in steps)
    if length > tile:
        assert places[-1] + tile == length


@given(height=st.integers(8, 40).map(lambda n: 2 * n), width=st.integers(8, 40).map(lambda n: 2 * n))
def test_what_each_tile_agrees_on_is_the_whole(height: int, width: int) -> None:
    latents = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    parts = []

    def predict(part: torch.Tensor, first: bool) -> torch.Tensor:
        parts.append((tuple(part.shape[-2:]), first))
        return 3 * part

    assert torch.allclose(in_tiles(predict, latents, 16), 3 * latents, atol=1e-5)
    assert {shape for shape, _ in parts} == {(min(16, height), min(16, width))}
    assert [first for _, first in parts] == [True] + [False] * (len(parts) - 1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_mixed_noise_stays_standard_normal(share: float) -> None:
    first, second = draw_noises(1, [1], 16, 64, 64)[0], draw_noises(1, [2], 16, 64, 64)[0]
    mixed = mixed_noise(first, second, [share])
    assert abs(mixed.std().item() - 1) < 0.02
    distances = [(mixed - one).norm().item() for one in (first, second)]
    assert (distances[0] < distances[1]) == (share < 0.5)
    assert torch.equal(mixed_noise(first, second, [1.0]), second)
    assert torch.equal(mixed_noise(first, second, [0.0]), first)
