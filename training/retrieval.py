"""Which training picture does a generated picture show?

Nearest neighbour among all training pictures by RMS pixel distance at 48x48, after aligning each candidate: mirrored
where training mirrors it, tilted, scaled and moved to fit best. A coarse search over fixed poses at 24x24 picks the
candidates, gradient steps on the pose thin them out at 24x24 and refine the rest at 48x48. A model that draws one fixed
pose is measured by the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.render import Renderer, pose_matrix, poses

SIDE, COARSE = 48, 24
TILTS = (-8.0, -4.0, 0.0, 4.0, 8.0)  # degrees
SCALES = (0.84, 0.92, 1.0)
CANDIDATES = 24  # (picture, mirrored) pairs that the fixed poses leave over
FINALISTS, FIRST_STEPS = 10, 6  # of these, how many are refined in full, and the steps at half size that choose them
STEPS = 20


def thumbnails(rgba: Tensor, side: int = SIDE) -> Tensor:
    """Area-averaged copies, colours weighted by alpha: uint8 [N, 4, S, S] -> uint8 [N, 4, side, side]."""
    parts = []
    for part in rgba.split(128):
        x = part.float() / 255
        x[:, :3] *= x[:, 3:]
        x = F.interpolate(x, size=side, mode="area")
        x[:, :3] /= x[:, 3:].clamp(min=1e-3)
        parts.append((x.clamp(0, 1) * 255).round().byte())
    return torch.cat(parts)


@dataclass(slots=True)
class Match:
    """Nearest pictures of a batch: `order` [B, k] picture indices, nearest first; `distance` [B, k] RMS in [0, 2]."""

    order: Tensor
    distance: Tensor

    def rank(self, row: int, right: list[int]) -> int:
        """Rank (0 is best) of the first right picture among the candidates; a large number if absent."""
        for rank, index in enumerate(self.order[row].tolist()):
            if index in right:
                return rank
        return 10**6


class PictureIndex:
    """The training pictures, searchable. `thumbs` is uint8 [N, 4, 48, 48]; `tint` >= 0 recolours all of them."""

    def __init__(
        self, thumbs: Tensor, flippable: list[bool], device: torch.device | str = "cpu", tint: int = -1
    ) -> None:
        self.render, self.device, self.tint = Renderer(thumbs, device, SIDE), device, tint
        self.count = len(thumbs)
        self.flippable = torch.tensor(flippable, device=device)
        grid = [(f, math.radians(t), s) for f in (1.0, -1.0) for t in TILTS for s in SCALES]
        self.variants = torch.tensor([(f, t, s, 0.0, 0.0) for f, t, s in grid], device=device)  # [V, 5]
        everything = torch.arange(self.count, device=device)
        self.bank = torch.stack([self._coarse(self._draw(everything, v.expand(self.count, 5))) for v in self.variants])

    def _draw(self, things: Tensor, pose: Tensor) -> Tensor:
        """Pictures [B, 3, 48, 48] in [-1, 1] on white."""
        x = self.render.place(things, torch.full_like(things, self.tint), pose, level=0)
        return (1 - x[:, 3:] + x[:, :3]) * 2 - 1

    @staticmethod
    def _coarse(x: Tensor) -> Tensor:
        return F.interpolate(x, size=COARSE, mode="area").flatten(1)

    def search(self, images: Tensor, keep: int = 10) -> Match:
        """Nearest pictures of images [B, 3, H, W] in [-1, 1]; `keep` of them are returned."""
        found = [self._search(part.to(self.device).float(), keep) for part in images.split(32)]
        return Match(torch.cat([o for o, _ in found]), torch.cat([d for _, d in found]))

    def _search(self, images: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        images = F.interpolate(images, size=SIDE, mode="area")
        query, half = self._coarse(images), len(self.variants) // 2
        distances = torch.stack([torch.cdist(query, bank) for bank in self.bank])  # [V, B, N]
        best, variant = distances.view(2, half, *distances.shape[1:]).min(1)  # [2, B, N]
        best[1, :, ~self.flippable] = math.inf
        nearest = best.permute(1, 0, 2).flatten(1).topk(min(CANDIDATES, self.count), largest=False).indices  # [B, C]
        flip, things = nearest // self.count, nearest % self.count
        rows = torch.arange(len(images), device=images.device)[:, None]
        start = self.variants[variant[flip, rows, things] + flip * half]  # [B, C, 5]
        rough = self.refine(F.interpolate(images, size=COARSE, mode="area"), things, start, FIRST_STEPS)
        final = rough.topk(min(FINALISTS, rough.shape[1]), largest=False).indices
        things, start = things.gather(1, final), start.gather(1, final[..., None].expand(-1, -1, 5))
        exact = self.refine(images, things, start)
        order = exact.argsort(1)
        things, exact = things.gather(1, order), exact.gather(1, order)
        return self._unique(things, exact, keep)

    def refine(self, images: Tensor, things: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
        """Smallest RMS distance [B, C] over tilt, scale and place, by Adam from the coarse pose.

        images [B, 3, H, H] with H 48 or 24; things [B, C] picture indices; start [B, C, 5] poses.
        """
        b, c = things.shape
        target = images.repeat_interleave(c, 0)
        rgba = self.render.levels[0 if images.shape[-1] == SIDE else 1][things.flatten()].float()
        rgba = self.render.tinted(rgba, things.flatten(), torch.full_like(things.flatten(), self.tint))
        flip = start[..., 0].flatten()
        free = torch.stack([start[..., 1], start[..., 2].log(), start[..., 3], start[..., 4]], -1).view(-1, 4).clone()
        first, second = torch.zeros_like(free), torch.zeros_like(free)
        best = torch.full((b * c,), math.inf, device=images.device)
        for step in range(1, steps + 1):
            free.requires_grad_(True)
            pose = poses(flip, free[:, 0], free[:, 1].exp(), free[:, 2], free[:, 3])
            grid = F.affine_grid(pose_matrix(pose), list(rgba.shape), align_corners=False)
            x = F.grid_sample(rgba, grid, padding_mode="zeros", align_corners=False)
            error = ((1 - x[:, 3:] + x[:, :3]) * 2 - 1 - target).square().mean((1, 2, 3))
            (slope,) = torch.autograd.grad(error.sum(), free)
            best = torch.minimum(best, error.detach())
            with torch.no_grad():
                first, second = 0.8 * first + 0.2 * slope, 0.95 * second + 0.05 * slope.square()
                direction = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
                free = (free - 0.02 * (1 - step / (steps + 1)) * direction).detach()
        return best.sqrt().view(b, c)

    @staticmethod
    def _unique(things: Tensor, exact: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Drop the worse one of a picture found both mirrored and not."""
        orders, distances = [], []
        for row, values in zip(things.tolist(), exact.tolist()):
            seen = dict(reversed(list(zip(row, values))))  # the first occurrence wins
            pairs = sorted(seen.items(), key=lambda item: item[1])[:keep]
            pairs += [(-1, math.inf)] * (keep - len(pairs))
            orders.append([i for i, _ in pairs])
            distances.append([d for _, d in pairs])
        return torch.tensor(orders), torch.tensor(distances)
