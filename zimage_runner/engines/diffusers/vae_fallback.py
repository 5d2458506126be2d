"""Diffusers' VAE when the usual decoding has failed: in float32 after a bad picture, in tiles when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

LARGEST_TILE = 512
"""Pixels a side. Half the picture's side if that is less: at least four tiles, a quarter of the memory."""


@contextlib.contextmanager
def fallback_vae(vae: Any, side: int, *, float32: bool, tiled: bool) -> Iterator[None]:
    """Switch diffusers' AutoencoderKL to float32 and/or tiles for pictures of at most ``side`` pixels, and back."""
    import torch

    dtype, tiling = vae.dtype, (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size)
    if float32 and dtype != torch.float32:
        vae.to(torch.float32)
    if tiled:
        tile = min(LARGEST_TILE, side // 2)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, tile, tile // factor
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = tiling
        if vae.dtype != dtype:
            vae.to(dtype)
