"""Scores of generated pictures against the evaluation cases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.captions import COLORS
from training.cases import Case
from training.retrieval import PictureIndex


@dataclass(slots=True)
class Score:
    """Shares of the cases: right at the first place, among the first five; for pairs and colours also by part."""

    cases: int
    top1: float
    top5: float
    parts: dict[str, float] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)


class Judge:
    """Scores pictures; indices of tinted pictures are built when first needed."""

    def __init__(self, thumbs: Tensor, flippable: list[bool], device: torch.device | str = "cpu") -> None:
        self.thumbs, self.flippable, self.device = thumbs, flippable, device
        self.indices: dict[int, PictureIndex] = {}

    def index(self, tint: int = -1) -> PictureIndex:
        """The index of all pictures in one tint."""
        if tint not in self.indices:
            self.indices[tint] = PictureIndex(self.thumbs, self.flippable, self.device, tint)
        return self.indices[tint]

    def score(self, cases: list[Case], images: Tensor) -> Score:
        """Score images [B, 3, H, W] in [-1, 1] of cases of one set."""
        if cases[0].tint >= 0:
            return self.colored(cases, images)
        if len(cases[0].right) == 2:
            return self.pairs(cases, images)
        return summary(cases, self.ranks(images, [c.right[0] for c in cases]))

    def ranks(self, images: Tensor, right: list[list[int]], tint: int = -1) -> list[int]:
        """Rank of the first right picture for each image."""
        match = self.index(tint).search(images)
        return [match.rank(row, indices) for row, indices in enumerate(right)]

    def pairs(self, cases: list[Case], images: Tensor) -> Score:
        """Each half alone: the left 64 pixels should show the first thing, the right 64 the second."""
        side = images.shape[-1] // 2
        middle = images[:, :, side // 2 : side // 2 + side]
        halves = [F.interpolate(middle[..., k : k + side], scale_factor=2, mode="bilinear") for k in (0, side)]
        left, right = (self.ranks(half, [c.right[k] for c in cases]) for k, half in enumerate(halves))
        parts = {
            "left": share(left, 1),
            "right": share(right, 1),
            "either": share([min(p) for p in zip(left, right)], 1),
        }
        result = summary(cases, [max(p) for p in zip(left, right)])
        result.parts = parts
        return result

    def colored(self, cases: list[Case], images: Tensor) -> Score:
        """Thing: nearest among all pictures in the colour asked for. Colour: the thing is nearest in that of the 11.

        Right means both; `top5` lets the thing be among five.
        """
        ranks, colour_right = [10**6] * len(cases), self.colour_right(cases, images)
        for tint in sorted({c.tint for c in cases}):
            rows = [i for i, c in enumerate(cases) if c.tint == tint]
            for i, rank in zip(rows, self.ranks(images[rows], [cases[i].right[0] for i in rows], tint)):
                ranks[i] = rank
        result = summary(cases, [r if ok else 10**6 for r, ok in zip(ranks, colour_right)])
        result.parts = {"thing": share(ranks, 1), "colour": sum(colour_right) / len(cases)}
        return result

    def colour_right(self, cases: list[Case], images: Tensor) -> list[bool]:
        """Whether the right thing in the asked colour is nearer than the same thing in the ten other colours."""
        distances = torch.full((len(cases), len(COLORS)), float("inf"))
        for tint in range(len(COLORS)):
            index = self.index(tint)
            things = torch.tensor([[c.right[0][0]] for c in cases], device=self.device)
            start = index.variants[len(index.variants) // 4].expand(len(cases), 1, 5)  # unmirrored, untilted
            small = F.interpolate(images.to(self.device).float(), size=48, mode="area")
            flipped = start.clone()
            flipped[..., 0] = -1
            both = [index.refine(small, things, pose)[:, 0] for pose in (start, flipped)]
            distances[:, tint] = torch.minimum(*both).cpu()
        return [distances[i].argmin().item() == c.tint for i, c in enumerate(cases)]


def share(ranks: list[int], within: int) -> float:
    """Share of ranks below `within`."""
    return sum(r < within for r in ranks) / len(ranks)


def summary(cases: list[Case], ranks: list[int]) -> Score:
    """Score from the ranks, with the missed prompts."""
    return Score(len(cases), share(ranks, 1), share(ranks, 5), misses=[c.prompt for c, r in zip(cases, ranks) if r > 0])
