"""How pictures take the drawn size, and that inpainting leaves the original outside the mask to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zimage_runner.pictures.masks import box_around, soft_mask, widened
from zimage_runner.pictures.opened import examine
from zimage_runner.pictures.placed import extended, fitted, place
from zimage_runner.sampling import Fit, Inputs

sides = st.integers(1, 40)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@given(width=sides, height=sides, to=st.tuples(sides, sides), fit=st.sampled_from(list(Fit)))
def test_every_fit_gives_the_size(width: int, height: int, to: tuple[int, int], fit: Fit) -> None:
    assert fitted(noise(width, height), to, fit).size == to


def test_a_side_cut_by_a_few_pixels_computes_nothing_anew() -> None:
    image = noise(70, 48)
    assert np.array_equal(np.asarray(fitted(image, (64, 48), Fit.crop)), np.asarray(image)[:, 3:67])


def test_what_each_fit_does() -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    crop, pad, stretch = (np.asarray(fitted(image, (10, 10), fit)) for fit in (Fit.crop, Fit.pad, Fit.stretch))
    assert (crop[:, 0] == (255, 0, 0)).all()
    assert (crop[:, -1] == (0, 0, 255)).all()
    assert (pad[0] == pad[2]).all()  # the edge goes on above
    assert (pad[:, 0] == (255, 0, 0)).all()
    assert (stretch[5, [0, -1]] == [(255, 0, 0), (0, 0, 255)]).all()


def test_an_edge_goes_on() -> None:
    wider = np.asarray(extended(noise(4, 3), (2, 1, 0, 3)))
    assert wider.shape == (7, 6, 3)
    assert np.array_equal(wider[1:4, 2:], np.asarray(noise(4, 3)))
    assert np.array_equal(wider[0, 2:], wider[1, 2:])


@given(mask=st.integers(0, 2**30 - 1), by=st.integers(0, 7))
def test_widening_takes_the_largest_around(mask: int, by: int) -> None:
    bits = np.array([mask >> n & 1 for n in range(30)], np.uint8).reshape(5, 6)
    wide = widened(bits, by)
    for row, column in np.ndindex(5, 6):
        around = bits[max(0, row - by) : row + by + 1, max(0, column - by) : column + by + 1]
        assert wide[row, column] == around.max()


@given(
    box=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20)),
    grow=st.integers(0, 5),
    blur=st.integers(0, 8),
    white=st.integers(9, 255),
)
def test_softening_stays_inside(box: tuple[int, int, int, int], grow: int, blur: int, white: int) -> None:
    left, top, width, height = box
    mask = np.zeros((40, 40), np.uint8)
    mask[top : top + height, left : left + width] = white
    mask[39, 39] = 5  # a speck, as JPEG leaves them
    soft = soft_mask(mask, grow, blur)
    outside = widened(np.where(mask > 8, mask, 0).astype(np.uint8), grow) == 0
    assert (soft[outside] == 0).all()
    assert soft.min() >= 0
    assert soft.max() <= white / 255 + 1e-6


def test_a_mask_up_to_the_picture_s_edge_is_not_softened_there() -> None:
    mask = np.full((32, 32), 255, np.uint8)
    mask[:, :10] = 0
    soft = soft_mask(mask, 0, 6)
    assert (soft[:, 30] == 1).all()
    assert (soft[[0, -1], 25] == 1).all()
    assert 0 < soft[16, 11] < 1


@given(
    place_=st.tuples(st.integers(0, 59), st.integers(0, 39)),
    margin=st.integers(0, 80),
    ratio=st.sampled_from([0.5, 1.0, 16 / 9]),
)
def test_the_box_lies_within_and_holds_the_mask(place_: tuple[int, int], margin: int, ratio: float) -> None:
    column, row = place_
    mask = np.zeros((40, 60), np.float32)
    mask[row, column] = 1
    left, top, right, bottom = box_around(mask, margin, ratio)
    assert 0 <= left <= column < right <= 60
    assert 0 <= top <= row < bottom <= 40
    if 2 * margin + 1 < 20:
        assert abs((right - left) - (bottom - top) * ratio) <= 2


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A noisy picture of 100x80 and a mask with a white square."""
    noise(100, 80).save(tmp_path / "image.png")
    mask = Image.new("L", (100, 80))
    mask.paste(255, (30, 20, 50, 40))
    mask.save(tmp_path / "mask.png")
    return {
        "image": examine(str(tmp_path / "image.png"), "image"),
        "mask": examine(str(tmp_path / "mask.png"), "mask", is_mask=True),
    }


def test_outside_the_mask_the_original_comes_back(files: dict[str, Any]) -> None:
    placed = place(Inputs(**files, mask_blur=4), 96, 80)
    assert placed.pixels is not None
    assert placed.mask is not None
    assert placed.finish is not None
    drawn = np.full((80, 96, 3), 7, np.uint8)
    finished = placed.finish(drawn)
    original = np.asarray(noise(100, 80))[:, 2:98]
    assert np.array_equal(placed.pixels, original)
    outside = np.ones((80, 96), bool)
    outside[20:40, 28:48] = False
    assert np.array_equal(finished[outside], original[outside])
    assert (finished[28:32, 36:40] == 7).all()
    assert place(Inputs(**files, mask_blur=4), 96, 80) is placed


def test_cropped_to_the_mask_the_whole_picture_comes_back(files: dict[str, Any]) -> None:
    placed = place(Inputs(**files, mask_crop=8, result=(100, 80)), 128, 128)
    assert placed.pixels is not None
    assert placed.finish is not None
    assert placed.pixels.shape == (128, 128, 3)
    finished = placed.finish(np.full((128, 128, 3), 7, np.uint8))
    original = np.asarray(noise(100, 80))
    assert finished.shape == original.shape
    changed = (finished != original).any(axis=-1)
    assert not changed[:20].any()
    assert not changed[:, 50:].any()
    assert (finished[25:35, 35:45] == 7).all()


def test_outpainting_keeps_the_picture(files: dict[str, Any]) -> None:
    placed = place(Inputs(image=files["image"], outpaint=(28, 0, 0, 16)), 128, 96)
    assert placed.finish is not None
    finished = placed.finish(np.full((96, 128, 3), 7, np.uint8))
    assert np.array_equal(finished[:80, 28:], np.asarray(noise(100, 80)))
    assert (finished[:, :20] == 7).all()
    assert (finished[90:] == 7).all()
