"""PSNR, SSIM and FLIP of two pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_runner.collect.likeness import likeness


def picture(seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def filled(*colour: int) -> np.ndarray:
    return np.full((32, 40, 3), colour, np.uint8)


def test_equal_pictures() -> None:
    found = likeness(picture(), picture())
    assert (found.psnr, found.flip) == (math.inf, 0.0)
    assert found.ssim == pytest.approx(1)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), small=st.integers(1, 8), more=st.integers(2, 8))
def test_more_noise_is_further_away_by_every_measure(seed: int, small: int, more: int) -> None:
    middle = np.clip(picture(seed), 64, 191)
    noise = np.random.default_rng(seed + 1).integers(-1, 2, middle.shape)
    near, far = (likeness(middle, (middle + amount * noise).astype(np.uint8)) for amount in (small, small * more))
    assert near.psnr > far.psnr
    assert near.ssim > far.ssim
    assert 0 < near.flip < far.flip < 1


def test_psnr_is_that_of_its_definition() -> None:
    assert likeness(filled(10, 10, 10), filled(12, 10, 10)).psnr == pytest.approx(-10 * math.log10(4 / 3 / 255**2))


def test_ssim_is_that_of_its_definition_for_plain_pictures() -> None:
    a, b, c1 = 10 / 255, 30 / 255, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)  # nothing varies
    assert likeness(filled(10, 10, 10), filled(30, 30, 30)).ssim == pytest.approx(expected, abs=1e-3)


def test_flip_reaches_one_for_green_and_blue_alone() -> None:
    """The scale is made of the two colours that are furthest apart; black and white are a little nearer."""
    assert likeness(filled(0, 255, 0), filled(0, 0, 255)).flip == pytest.approx(1, abs=1e-5)
    assert 0.9 < likeness(filled(0, 0, 0), filled(255, 255, 255)).flip < 1


def test_flip_sees_edges_and_forgives_what_the_eye_does_not_resolve() -> None:
    grey, edge, fine = (filled(128, 128, 128).copy() for _ in range(3))
    edge[:, 20:] = 160
    fine[:, ::2], fine[:, 1::2] = 124, 132  # stripes of one pixel, 34 to a degree
    assert likeness(grey, fine).flip < likeness(grey, edge).flip
    coarse = filled(128, 128, 128).copy()
    for start in range(0, 40, 20):
        coarse[:, start : start + 10], coarse[:, start + 10 : start + 20] = 124, 132
    assert likeness(grey, fine).flip < likeness(grey, coarse).flip + 0.05
