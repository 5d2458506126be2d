"""Noise levels must not follow the batch's order, which lists single pictures first."""

from __future__ import annotations

import torch

from training.train_transformer import SHIFT, noise_levels

CPU = torch.device("cpu")


def test_stratified_over_the_whole_range() -> None:
    sigma = noise_levels(1000, CPU)
    u = sigma / (SHIFT - (SHIFT - 1) * sigma)
    assert u.sort().values.diff().max() < 0.002  # one in each thousandth
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() <= 1


def test_single_pictures_meet_every_level() -> None:
    """The first run of the shipped model failed this: the first 58 % of a batch got the lower 58 % of the levels."""
    torch.manual_seed(0)
    sigma = noise_levels(1536, CPU)
    singles, scenes = sigma[: int(1536 * 0.58)], sigma[int(1536 * 0.58) :]
    for part in (singles, scenes):
        assert part.min() < 0.02
        assert part.max() > 0.99
    assert abs(singles.mean() - scenes.mean()) < 0.05


def test_two_batches_have_two_orders() -> None:
    assert not torch.equal(noise_levels(64, CPU).argsort(), noise_levels(64, CPU).argsort())
