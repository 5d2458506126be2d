"""Latents of the training pictures: rendered and encoded once, kept on the accelerator in bf16."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.parallel import Team
from training.render import Poser, Renderer


def make_encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """A function from pictures [B, 3, 128, 128] in [-1, 1] to normalised latent means [B, 16, 16, 16]."""
    vae.encoder.to(memory_format=torch.channels_last)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    device = next(vae.parameters()).device

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.encoder(x.contiguous(memory_format=torch.channels_last)).float().chunk(2, 1)[0]
        return (mean - shift) * scale

    return encode


class TrainingPool:
    """Captions and latents of this process.

    Every process renders its own poses of single pictures, and encodes its own share of the scenes. Rendering stops
    after `seconds`; scenes not reached are left out, the ones with long captions come first.
    """

    def __init__(self, folder: Path, render: Renderer, poser: Poser, encode: Callable[[Tensor], Tensor], team: Team,
                 count: int, variants: int, seconds: float) -> None:  # fmt: skip
        self.device = team.device
        start = time.time()
        array = {p.stem: torch.from_numpy(np.load(p)) for p in sorted(folder.glob("*.npy"))}
        self.single = {int(k[7:]): v.to(self.device) for k, v in array.items() if k.startswith("single_")}
        everything = torch.arange(count, device=self.device)
        poses_of = [self._encode_singles(everything, render, poser, encode) for _ in range(variants)]
        self.pictures = torch.stack(poses_of, 1)  # [N, variants, 16, 16, 16]
        mine = torch.arange(
            len(array["things"]) - 1 - team.rank, -1, -team.size
        )  # last first: these have long captions
        row_of = torch.full((len(array["things"]),), -1, dtype=torch.long)
        parts: list[Tensor] = []
        for rows in mine.split(512):
            if parts and time.time() - start > seconds:
                break
            row_of[rows] = torch.arange(len(rows)) + sum(map(len, parts))
            things, tints, back = (array[k][rows].long().to(self.device) for k in ("things", "tints", "backdrop"))
            parts.append(encode(render(things, tints, back, poser.training(things))).bfloat16())
        self.scenes = torch.cat(parts)
        self.scene_ids: dict[int, Tensor] = {}
        self.scene_rows: dict[int, Tensor] = {}
        for bucket in self.single:
            rows = row_of[array[f"row_{bucket}"].long()]
            self.scene_ids[bucket] = array[f"scene_{bucket}"][rows >= 0].to(self.device)
            self.scene_rows[bucket] = rows[rows >= 0].to(self.device)
        self.report = (
            f"{variants} poses of {count} pictures, {len(self.scenes)} scenes encoded in {time.time() - start:.1f} s"
        )

    @staticmethod
    def _encode_singles(
        everything: Tensor, render: Renderer, poser: Poser, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        parts = []
        for indices in everything.split(512):
            things = torch.stack([indices, torch.full_like(indices, -1)], 1)
            natural = torch.full_like(things, -1)
            parts.append(encode(render(things, natural, natural[:, 0], poser.training(things))).bfloat16())
        return torch.cat(parts)

    def draw(self, batch: int, bucket: int, weights: Tensor, single: float) -> tuple[Tensor, Tensor]:
        """(latents fp32 [batch, 16, 16, 16], token ids int64 [batch, bucket]); `single`: share of single pictures."""
        first = int(batch * single)
        index = torch.multinomial(weights, first, replacement=True)
        table = self.single[bucket]
        pose = torch.randint(self.pictures.shape[1], (first,), device=self.device)
        caption = torch.randint(table.shape[1], (first,), device=self.device)
        scene = torch.randint(len(self.scene_rows[bucket]), (batch - first,), device=self.device)
        z = torch.cat([self.pictures[index, pose], self.scenes[self.scene_rows[bucket][scene]]])
        ids = torch.cat([table[index, caption], self.scene_ids[bucket][scene]])
        return z.float(), ids.long()
