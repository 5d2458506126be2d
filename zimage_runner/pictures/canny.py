"""Edges of a picture (Canny, 1986), as OpenCV's ``Canny`` finds them: the condition that most ControlNets know.

In whole numbers, so the same everywhere. Three channels are looked at apart, and of each pixel the one with the
steepest slope counts, as in OpenCV and in controlnet_aux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zimage_runner.sampling import CANNY_HIGH, CANNY_LOW

if TYPE_CHECKING:
    import numpy as np

TAN_22 = 13573
"""The tangent of 22.5 degrees in 1 / 32768."""


def canny(picture: np.ndarray, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> np.ndarray:
    """White edges on black, uint8 [height, width, 3], of a picture uint8 [height, width, 3].

    Pixels on a ridge steeper than ``high`` are edges, and those steeper than ``low`` that such a one leads to.
    """
    import numpy as np

    dx, dy = _slopes(picture)
    size = np.abs(dx) + np.abs(dy)
    steepest = size.argmax(-1)[..., None]
    dx, dy, size = (np.take_along_axis(part, steepest, -1)[..., 0] for part in (dx, dy, size))
    ridge = _ridges(dx, dy, size) & (size > low)
    edges = _led_to(ridge, ridge & (size > high))
    return np.repeat(np.where(edges, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)


def _slopes(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's differences to the right and downwards, of each channel; beyond its border the picture goes on as is."""
    import numpy as np

    p = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = p[:, 2:] - p[:, :-2]
    down = p[2:] - p[:-2]
    return (
        across[:-2] + 2 * across[1:-1] + across[2:],
        down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:],
    )


def _ridges(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where a slope is steeper than before and behind it, in the one of four directions that is closest to its own."""
    import numpy as np

    around = np.pad(size, 1)
    height, width = size.shape

    def at(down: int, right: int) -> np.ndarray:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = y < x * TAN_22
    steep = y > x * TAN_22 + (x << 16)
    along = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    falling = (dx ^ dy) < 0
    diagonal = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    return np.where(flat, along, np.where(steep, upright, diagonal))


def _led_to(ridge: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Pixels of ``ridge`` that a chain of neighbours, corners included, joins to one of ``start``."""
    import numpy as np

    width = ridge.shape[1] + 2
    open_ = np.pad(ridge, 1).ravel()
    found = np.pad(start, 1).ravel()
    reached = np.flatnonzero(found)
    open_[reached] = False
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    while reached.size:
        near = np.unique((reached[:, None] + steps).ravel())
        reached = near[open_[near]]
        open_[reached] = False
        found[reached] = True
    return found.reshape(ridge.shape[0] + 2, width)[1:-1, 1:-1]
