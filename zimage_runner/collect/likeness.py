"""How far apart two pictures of the same thing are: PSNR, SSIM and FLIP. Pictures are uint8 [height, width, 3], sRGB.

FLIP: Andersson et al., "FLIP: A Difference Evaluator for Alternating Images", 2020: what a person sees of a difference
who looks at both pictures in turn, from 0 (nothing) to 1; here its mean over the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180
"""A monitor of 3840 pixels on 0.7 m, seen from 0.7 m: the paper's."""
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5
SSIM_CONSTANTS = (0.01**2, 0.03**2)
"""Wang et al. 2004, for values 0..1."""
SENSITIVITY = {"Y": (1, 0.0047, 0, 1e-5), "Cx": (1, 0.0053, 0, 1e-5), "Cz": (34.1, 0.04, 13.5, 0.025)}
"""a1, b1, a2, b2 of the contrast sensitivity to each opponent colour: FLIP's table 1."""
COLOUR_EXPONENT, FEATURE_EXPONENT = 0.7, 0.5
COLOUR_SHARE, ERROR_SHARE = 0.4, 0.95
"""Differences up to this share of the largest are spread over this share of 0..1."""
FEATURE_WIDTH = 0.082
"""Degrees, of the edges and points that are looked for."""
WHITE = (0.950428545, 1.0, 1.088900371)
TO_XYZ = (
    (0.4123907993, 0.3575843394, 0.1804807884),
    (0.2126390059, 0.7151686788, 0.0721923154),
    (0.0193308187, 0.1191947798, 0.9505321522),
)
"""Linear sRGB to CIE XYZ."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Of two pictures."""

    psnr: float
    """Decibels; inf for equal pictures."""
    ssim: float
    flip: float


def likeness(first: np.ndarray, second: np.ndarray) -> Likeness:
    """Compare two pictures of equal size. FLIP takes the first for the reference. Imports torch."""
    import torch

    a, b = (torch.from_numpy(x).permute(2, 0, 1).float() / 255 for x in (first, second))
    error = (a - b).square().mean().item()
    psnr = math.inf if error == 0 else -10 * math.log10(error)
    return Likeness(psnr, _ssim(a, b), _flip(a, b))


def _ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pixels and channels, by a Gaussian window, without a border."""

    window = _gauss(SSIM_RADIUS, SSIM_SIGMA)

    def blurred(y: torch.Tensor) -> torch.Tensor:
        return _filtered(y, window, window, border=False)

    mean_a, mean_b = blurred(a), blurred(b)
    variance_a, variance_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = SSIM_CONSTANTS
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (numerator / denominator).mean().item()


def _gauss(radius: int, sigma: float) -> torch.Tensor:
    """Weights [2 * radius + 1] that add up to one."""
    import torch

    weights = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    return weights / weights.sum()


def _filtered(x: torch.Tensor, down: torch.Tensor, across: torch.Tensor, border: bool = True) -> torch.Tensor:
    """Each channel of x [channels, height, width] correlated with ``down`` along columns and ``across`` along rows.

    ``border``: repeat the edge beyond it; otherwise what lacks neighbours is left out.
    """
    import torch.nn.functional as F

    x = x[:, None]
    if border:
        rows, columns = len(down) // 2, len(across) // 2
        x = F.pad(x, (columns, columns, rows, rows), mode="replicate")
    return F.conv2d(F.conv2d(x, down.view(1, 1, -1, 1)), across.view(1, 1, 1, -1))[:, 0]


def _flip(reference: torch.Tensor, test: torch.Tensor) -> float:
    colour = _colour_difference(reference, test)
    return colour.pow(1 - _feature_difference(reference, test)).mean().item()


def _colour_difference(reference: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """[height, width], 0..1: what the eye's low resolution leaves, by the distance of colours."""
    import torch

    seen = [_hunt(_lab(_without_detail(_opponent(_linear(x))))) for x in (reference, test)]
    corners = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).T[:, :, None]  # green and blue: as far apart as can be
    green, blue = _hunt(_lab(corners)).split(1, dim=1)
    largest = _distance(green, blue).pow(COLOUR_EXPONENT).item()
    difference = _distance(*seen).pow(COLOUR_EXPONENT)
    limit = COLOUR_SHARE * largest
    steep = ERROR_SHARE + (difference - limit) / (largest - limit) * (1 - ERROR_SHARE)
    return torch.where(difference < limit, difference * ERROR_SHARE / limit, steep).clamp(0, 1)


def _feature_difference(reference: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """[height, width], 0..1: how edges and points of brightness differ."""
    import torch

    brightness = [(_opponent(_linear(x))[:1] + 16) / 116 for x in (reference, test)]
    differences = []
    sigma = 0.5 * FEATURE_WIDTH * PIXELS_PER_DEGREE
    radius = math.ceil(3 * sigma)
    smooth, x = _gauss(radius, sigma), torch.arange(-radius, radius + 1).float()
    for derivative in (-x * smooth, (x.square() / sigma**2 - 1) * smooth):
        positive, negative = derivative.clamp(min=0), derivative.clamp(max=0)
        kernel = positive / positive.sum() - negative / negative.sum()
        across, down = ([_filtered(y, *pair)[0] for y in brightness] for pair in ((smooth, kernel), (kernel, smooth)))
        lengths = [torch.hypot(*both) for both in zip(across, down)]
        differences.append((lengths[0] - lengths[1]).abs())
    return (torch.maximum(*differences) / math.sqrt(2)).clamp(0, 1).pow(FEATURE_EXPONENT)


def _without_detail(opponent: torch.Tensor) -> torch.Tensor:
    """Linear sRGB of an opponent colour picture without what the eye does not resolve."""
    import torch

    widest = max(b for _, b1, _, b2 in SENSITIVITY.values() for b in (b1, b2))
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    channels = []
    for x, (a1, b1, a2, b2) in zip(opponent, SENSITIVITY.values()):
        # A sum of two Gaussians, a * sqrt(pi / b) * exp(-pi^2 * degrees^2 / b), that adds up to one.
        parts = []
        for a, b in ((a1, b1), (a2, b2)):
            sigma = math.sqrt(b / 2) / math.pi * PIXELS_PER_DEGREE
            weights = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
            parts.append((a * math.sqrt(math.pi / b) * weights.sum().item() ** 2, weights / weights.sum()))
        whole = sum(share for share, _ in parts)
        channels.append(sum(share / whole * _filtered(x[None], w, w)[0] for share, w in parts if share))
    return _from_opponent(torch.stack(channels)).clamp(0, 1)


def _linear(x: torch.Tensor) -> torch.Tensor:
    """Linear sRGB of an sRGB picture [3, height, width] in 0..1."""
    import torch

    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).pow(2.4))


def _xyz(linear: torch.Tensor) -> torch.Tensor:
    """CIE XYZ of linear sRGB, relative to white."""
    import torch

    return torch.einsum("ij,jhw->ihw", torch.tensor(TO_XYZ), linear) / torch.tensor(WHITE)[:, None, None]


def _opponent(linear: torch.Tensor) -> torch.Tensor:
    """Brightness, red against green, blue against yellow (YCxCz)."""
    import torch

    x, y, z = _xyz(linear)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _from_opponent(opponent: torch.Tensor) -> torch.Tensor:
    """Linear sRGB of brightness and the two opponent colours."""
    import torch

    brightness, red, blue = opponent
    y = (brightness + 16) / 116
    xyz = torch.stack([y + red / 500, y, y - blue / 200]) * torch.tensor(WHITE)[:, None, None]
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(torch.tensor(TO_XYZ)), xyz)


def _lab(linear: torch.Tensor) -> torch.Tensor:
    """CIE L*a*b*."""
    import torch

    xyz, delta = _xyz(linear), 6 / 29
    x, y, z = torch.where(xyz > delta**3, xyz.clamp(min=1e-9).pow(1 / 3), xyz / (3 * delta**2) + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _hunt(lab: torch.Tensor) -> torch.Tensor:
    """Colours look the paler the darker they are."""
    import torch

    return torch.cat([lab[:1], 0.01 * lab[:1] * lab[1:]])


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """HyAB: city block between brightness and colour."""
    import torch

    difference = a - b
    return difference[0].abs() + torch.linalg.vector_norm(difference[1:], dim=0)
