"""Edges are OpenCV's, to the pixel: sha256 of what cv2.Canny 5.0.0 makes of the same picture."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from zimage_runner.pictures.canny import canny


def picture() -> np.ndarray:
    """Waves of another frequency in each channel, a box and a bar."""
    y, x = np.mgrid[0:70, 0:90]
    waves = [(x * x * (3 + c) + y * y * (5 - c)) // 60 % 256 for c in range(3)]
    pixels = np.stack(waves, -1).astype(np.uint8)
    pixels[20:50, 30:70] = (200, 40, 90)
    pixels[35:45, 10:80, 1] = 255
    return pixels


@pytest.mark.parametrize(
    ("low", "high", "count", "sha256"),
    [
        (100, 200, 634, "4b1d20d447f6dbb2"),
        (30, 90, 807, "733adc331103fdbf"),
        (0, 0, 1064, "962a53968e5a1008"),
        (400, 1200, 568, "c6e1d3315b689f21"),
    ],
)
def test_edges_are_opencvs(low: int, high: int, count: int, sha256: str) -> None:
    edges = canny(picture(), low, high)
    assert edges.dtype == np.uint8
    assert (edges == edges[..., :1]).all()
    assert int((edges[..., 0] == 255).sum()) == count == int((edges[..., 0] > 0).sum())
    assert hashlib.sha256(edges[..., 0].tobytes()).hexdigest().startswith(sha256)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_the_smallest_pictures(shape: tuple[int, int]) -> None:
    assert not canny(np.full((*shape, 3), 77, np.uint8)).any()


def test_a_weak_edge_counts_where_a_strong_one_leads_to_it() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[10:, :20] = 255  # a strong edge that fades to the right
    pixels[10:, 20:] = 40
    edges = canny(pixels, 100, 800)[..., 0]
    assert edges[9:11, 25:35].any()
    pixels[:, :20] = 0  # without the strong one, the same slope is none
    edges = canny(pixels, 100, 800)[..., 0]
    assert not edges[9:11, 25:35].any()
