"""Pictures on the accelerator: poses, tints, backdrops and pairs, drawn from RGBA emoji."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.captions import COLORS
from training.lexicon import colors
from training.names import spread

LUMA = (0.30, 0.59, 0.11)
TINTS = [colors()[name]["rgb"] for name in COLORS]
SMALL = 0.6  # things drawn smaller than this are sampled from a half-size copy


def load_rgba(packed: Path, limit: int | None = None) -> Tensor:
    """All packed pictures: uint8 [N, 4, 256, 256]."""
    with tarfile.open(packed / "pictures.tar") as tar:
        members = tar.getmembers()
        files = [tar.extractfile(members[i]) for i in spread(len(members), limit)]
        arrays = [np.asarray(Image.open(io.BytesIO(f.read())).convert("RGBA")) for f in files if f is not None]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def poses(flip: Tensor, tilt: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pose vectors [..., 5]: flip -1 or 1, tilt in radians, scale (1 fills the canvas), centre in [-1, 1]."""
    return torch.stack([flip, tilt, scale, x, y], -1)


def pose_matrix(pose: Tensor) -> Tensor:
    """Affine matrices [..., 2, 3] from output to input coordinates, as `affine_grid` wants them."""
    flip, tilt, scale, x, y = pose.unbind(-1)
    cos, sin = tilt.cos() / scale, tilt.sin() / scale
    first = torch.stack([flip * cos, flip * sin, -flip * (cos * x + sin * y)], -1)
    second = torch.stack([-sin, cos, sin * x - cos * y], -1)
    return torch.stack([first, second], -2)


class Renderer:
    """Draws scenes from premultiplied RGBA pictures.

    `rgba` is uint8 [N, 4, S, S]; pictures come out as [B, 3, size, size] in [-1, 1]. Sources of at least twice `size`
    are sampled at double resolution and averaged down.
    """

    def __init__(self, rgba: Tensor, device: torch.device | str, size: int = 128) -> None:
        self.device, self.size = device, size
        self.supersample = 2 if rgba.shape[-1] >= 2 * size else 1
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.levels = [torch.cat([self._premultiply(part.to(device)).to(dtype) for part in rgba.split(64)])]
        self.levels.append(F.avg_pool2d(self.levels[0], 2))
        self.gamma = torch.cat([self._gamma(part.float()) for part in self.levels[1].split(64)])
        self.tints = torch.tensor(TINTS, device=device)
        backdrops = self.tints * 0.85 + 0.15
        backdrops[COLORS.index("white")] = 1.0
        self.backdrops = torch.cat([backdrops, torch.ones(1, 3, device=device)])  # index -1: white

    @staticmethod
    def _premultiply(rgba: Tensor) -> Tensor:
        x = rgba.float() / 255
        x[:, :3] *= x[:, 3:]
        return x

    @staticmethod
    def _gamma(x: Tensor) -> Tensor:
        """Exponent that brings each picture's mean luminance to one half, so that tints look alike on all."""
        luma = (x[:, :3] * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1).sum((1, 2)) / x[:, 3].sum((1, 2)).clamp(min=1)
        return (math.log(0.5) / luma.clamp(0.05, 0.95).log()).clamp(0.35, 2.5)

    def tinted(self, x: Tensor, things: Tensor, tints: Tensor) -> Tensor:
        """Replace hue by a tint, keeping light and shade: x premultiplied [B, 4, H, W], tint -1 leaves as is."""
        alpha = x[:, 3:]
        rgb = x[:, :3] / alpha.clamp(min=1e-3)
        luma = (rgb * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).clamp(1e-3, 1)
        luma = luma ** self.gamma[things].view(-1, 1, 1, 1)
        color = self.tints[tints.clamp(min=0)].view(-1, 3, 1, 1)
        dark, light = color * 0.3, color + (1 - color) * 0.75
        shaded = torch.where(luma < 0.5, dark + (color - dark) * 2 * luma, color + (light - color) * (2 * luma - 1))
        return torch.where((tints >= 0).view(-1, 1, 1, 1), torch.cat([shaded * alpha, alpha], 1), x)

    def place(self, things: Tensor, tints: Tensor, pose: Tensor, level: int) -> Tensor:
        """One thing a canvas: premultiplied [B, 4, size, size]."""
        side = self.size * self.supersample
        grid = F.affine_grid(pose_matrix(pose), [len(things), 4, side, side], align_corners=False)
        source = self.levels[level][things].float()
        x = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.supersample > 1:
            x = F.avg_pool2d(x, self.supersample)
        return self.tinted(x, things, tints)

    @torch.no_grad()
    def __call__(self, things: Tensor, tints: Tensor, backdrop: Tensor, pose: Tensor) -> Tensor:
        """Draw: things and tints [B, 2] (second -1: absent), backdrop [B] (-1: white), pose [B, 2, 5]."""
        out = self.backdrops[backdrop].view(-1, 3, 1, 1).repeat(1, 1, self.size, self.size)
        for slot in range(things.shape[1]):
            small = pose[:, slot, 2] < SMALL
            for level, here in enumerate((~small, small)):
                rows = (here & (things[:, slot] >= 0)).nonzero()[:, 0]
                if rows.numel():
                    x = self.place(things[rows, slot], tints[rows, slot], pose[rows, slot], level)
                    out[rows] = out[rows] * (1 - x[:, 3:]) + x[:, :3]
        return out * 2 - 1


class Poser:
    """Random poses: what different seeds of one caption look like."""

    def __init__(self, flippable: list[bool], device: torch.device | str) -> None:
        self.flippable = torch.tensor(flippable, device=device)
        self.device = device

    def _normal(self, shape: torch.Size, std: float) -> Tensor:
        return (torch.randn(shape, device=self.device) * std).clamp(-2 * std, 2 * std)

    def _uniform(self, shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, device=self.device) * (high - low) + low

    def _flip(self, things: Tensor) -> Tensor:
        flipped = (torch.rand(things.shape, device=self.device) < 0.5) & self.flippable[things.clamp(min=0)]
        return 1.0 - 2.0 * flipped

    def training(self, things: Tensor) -> Tensor:
        """Mirrored half the time where harmless, tilted up to 10 degrees, 82 to 98 % large, moved up to 3 pixels.

        Two things share the canvas left and right at half the size. things [B, 2] -> [B, 2, 5].
        """
        shape, paired = things.shape, (things[:, 1:] >= 0).expand(-1, 2)
        scale = torch.where(paired, self._uniform(shape, 0.44, 0.52), self._uniform(shape, 0.82, 0.98))
        side = torch.tensor([-0.5, 0.5], device=self.device).expand(shape) * paired
        x = side + self._uniform(shape, -0.05, 0.05) * (1 - 0.5 * paired.float())
        y = self._uniform(shape, -0.05, 0.05)
        return poses(self._flip(things), self._normal(shape, math.radians(5)), scale, x, y)

    def canonical(self, things: Tensor) -> Tensor:
        """No mirror, no tilt, the middle of the training sizes."""
        shape, paired = things.shape, (things[:, 1:] >= 0).expand(-1, 2).float()
        side = torch.tensor([-0.5, 0.5], device=self.device).expand(shape) * paired
        ones = torch.ones(shape, device=self.device)
        return poses(ones, 0 * ones, 0.9 - 0.42 * paired, side, 0 * ones)

    def wide(self, things: Tensor) -> Tensor:
        """Any size from 40 to 150 %, any place: what the VAE should know. things [B, 2] -> [B, 2, 5]."""
        shape = things.shape
        scale = 0.4 * (1.5 / 0.4) ** torch.rand(shape, device=self.device)
        x, y = self._uniform(shape, -0.35, 0.35), self._uniform(shape, -0.35, 0.35)
        return poses(self._flip(things), self._normal(shape, math.radians(12)), scale, x, y)


def contact_sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """Tile pictures [N, 3, H, W] in [-1, 1]."""
    x = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = x.shape
    rows = -(-count // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(x):
        r, c = divmod(i, columns)
        sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = tile
    return Image.fromarray(sheet)
