"""Initial noise, drawn per item so that a picture does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def draw_noise(seeds: Sequence[int], channels: int, height: int, width: int, device: str = "cpu") -> torch.Tensor:
    """Standard normal noise [len(seeds), channels, height, width] float32 on the CPU, one generator per seed.

    height and width are latent sizes. ``device`` is where the numbers are drawn: the CPU's sequence is the
    same on every machine, a GPU's depends on its generator (Philox) and is only the same among CUDA devices.
    """
    shape = (channels, height, width)
    rows = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows).cpu()
