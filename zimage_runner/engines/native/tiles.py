"""Large pictures in overlapping tiles: each step predicts tile by tile and takes the mean where they overlap.

The model sees each tile as a picture of its own, so this is for redrawing what is there, not for composing
(MultiDiffusion, Bar-Tal et al. 2023, with weights that fall towards a tile's edge).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from zimage_runner.model import PATCH

OVERLAP = 4
"""Neighbours share at least the tile's side divided by this."""


def in_tiles(
    predict: Callable[[torch.Tensor, bool], torch.Tensor],
    latents: torch.Tensor,
    tile: int,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Velocity [batch, channels, height, width] of latents; ``predict(part, is the first part)`` gives one tile's.

    ``tile``: positions a side; 0, or latents that fit into one: all at once. ``beside`` [pictures, more channels,
    height, width] is cut into the same tiles, and ``predict`` gets its channels behind the latents'; of a batch that
    holds the pictures twice, both times.
    """
    height, width = latents.shape[-2:]
    given = latents
    if tile and beside is not None:
        given = torch.cat([latents, beside.repeat(len(latents) // len(beside), 1, 1, 1)], dim=1)
    if not tile or (height <= tile and width <= tile):
        return predict(given, True)
    rows, columns = starts(height, tile), starts(width, tile)
    tall, wide = min(tile, height), min(tile, width)
    weight = ramp(tall, tile, latents.device)[:, None] * ramp(wide, tile, latents.device)[None, :]
    total, weights = torch.zeros_like(latents, dtype=torch.float32), torch.zeros(height, width, device=latents.device)
    for n, (top, left) in enumerate(itertools.product(rows, columns)):
        window = (..., slice(top, top + tall), slice(left, left + wide))
        # A recorded forward's result is overwritten by the next one's: it is added up at once.
        total[window] += weight * predict(given[window].contiguous(), n == 0)
        weights[window] += weight
    return total / weights


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: as few as overlap enough, evenly, on whole patches."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // (tile - tile // OVERLAP)) + 1
    places = [round(n * (length - tile) / (count - 1) / PATCH) * PATCH for n in range(count)]
    return [min(place, length - tile) for place in places]


def ramp(length: int, tile: int, device: torch.device) -> torch.Tensor:
    """Weights of a tile along a side: 1 in the middle, falling within the overlap, nowhere 0."""
    places = torch.arange(length, device=device, dtype=torch.float32)
    return torch.minimum(places + 1, length - places).clamp(max=max(1, tile // OVERLAP)) / max(1, tile // OVERLAP)
