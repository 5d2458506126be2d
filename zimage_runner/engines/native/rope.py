"""Rotary position embedding over three axes (caption position, row, column), with real numbers.

The published code multiplies complex numbers; a table of cosines and sines is the same rotation and is what a
fused kernel reads. Positions follow diffusers' ZImageTransformer2DModel.patchify_and_embed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from zimage_runner.model import padded_length


class RotaryTable(NamedTuple):
    """Cosines and sines [tokens, head_dim / 2], float32, shared by all heads and all items of a batch."""

    cos: torch.Tensor
    sin: torch.Tensor


def caption_positions(caption_length: int) -> torch.Tensor:
    """Positions [caption_length, 3] of a padded caption: (1, 0, 0), (2, 0, 0), ...; padding tokens count on."""
    positions = torch.zeros(caption_length, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, caption_length + 1)
    return positions


def image_positions(rows: int, columns: int, caption_length: int) -> torch.Tensor:
    """Positions [padded_length(rows * columns), 3] of image tokens, which follow a caption of padded length.

    Token (r, c) sits at (caption_length + 1, r, c); padding tokens all sit at (0, 0, 0).
    """
    positions = torch.zeros(padded_length(rows * columns), 3, dtype=torch.int64)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    positions[: rows * columns, 0] = caption_length + 1
    positions[: rows * columns, 1:] = grid
    return positions


def rotary_table(positions: torch.Tensor, axes_dims: Sequence[int], theta: float) -> RotaryTable:
    """Cosine and sine of each position's angles, axes side by side. Angles are rounded to float32 as published."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(positions[:, axis].double(), frequencies).float())
    all_angles = torch.cat(angles, dim=-1)
    return RotaryTable(all_angles.cos(), all_angles.sin())


def sequence_tables(
    rows: int,
    columns: int,
    caption_length: int,
    axes_dims: Sequence[int],
    theta: float,
    to_device: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[RotaryTable, RotaryTable]:
    """Tables of the image tokens alone and of the unified sequence: image tokens, then caption tokens."""
    positions = torch.cat([image_positions(rows, columns, caption_length), caption_positions(caption_length)])
    unified = move_table(rotary_table(positions, axes_dims, theta), to_device)
    tokens = padded_length(rows * columns)
    return RotaryTable(unified.cos[:tokens], unified.sin[:tokens]), unified


def move_table(table: RotaryTable, to_device: Callable[[torch.Tensor], torch.Tensor]) -> RotaryTable:
    """The table on the device, in one copy."""
    return RotaryTable(*to_device(torch.stack(table)).unbind(0))


def check_axes(rows: int, columns: int, caption_length: int, axes_lens: Sequence[int]) -> None:
    """Raise ValueError where a position lies beyond the table the model was trained with."""
    for name, needed, limit in (
        ("padded caption tokens", caption_length + 2, axes_lens[0]),
        ("rows of image tokens", rows, axes_lens[1]),
        ("columns of image tokens", columns, axes_lens[2]),
    ):
        if needed > limit:
            raise ValueError(f"{needed} {name} exceed this model's {limit} positions")
