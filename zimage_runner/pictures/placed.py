"""An item's pictures at the size that is drawn, and what is kept of the original in the finished picture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_runner.pictures.canny import canny
from zimage_runner.pictures.masks import box_around, soft_mask
from zimage_runner.pictures.opened import load
from zimage_runner.sampling import Fit, Inputs, Preprocess

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GREY = 127.5
"""0 for the autoencoder, between black and white."""
Box = tuple[int, int, int, int]
"""left, top, right, bottom."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placed:
    """What an item starts from, at the size that is drawn."""

    pixels: np.ndarray | None
    """uint8 [height, width, 3]; None: it starts from noise."""
    mask: np.ndarray | None = None
    """float32 [height, width], 1 where it is painted anew, 0 where it stays; None: all is drawn."""
    control: np.ndarray | None = None
    """uint8 [height, width, 3] that a ControlNet follows."""
    control_scale: float = 1.0
    """How strongly."""
    noise_from: int | None = None
    """Seed whose noise is mixed with the item's own; None: it is the item's alone."""
    noise_share: float = 1.0
    """How much of it is the item's."""
    around: np.ndarray | None = None
    """float32 [height, width, 3] of 0 to 255: ``pixels`` with grey where the mask is, for a ControlNet that is told."""
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    """The finished picture of what was drawn: the original outside the mask. None: what was drawn is finished."""


def place(inputs: Inputs, width: int, height: int) -> Placed:
    """Return the pictures of an item that is drawn at width x height. Raises InputChanged.

    Equal arguments give one object, as long as few others come between.
    """
    return _place(inputs, width, height)


@functools.lru_cache(maxsize=4)
def _place(inputs: Inputs, width: int, height: int) -> Placed:
    import numpy as np

    size = (width, height)
    also: dict[str, Any] = {"noise_from": inputs.variation_seed, "noise_share": inputs.variation}
    if inputs.control_image is not None:
        control = np.asarray(fitted(load(inputs.control_image), size, inputs.fit))
        if inputs.control_preprocess is Preprocess.canny:
            control = canny(control, inputs.canny_low, inputs.canny_high)
        also |= {"control": control, "control_scale": inputs.control_scale}
    if inputs.image is None:
        return Placed(pixels=None, **also)
    canvas = extended(load(inputs.image), inputs.outpaint)
    if not inputs.inpaints:
        return Placed(pixels=np.asarray(fitted(canvas, size, inputs.fit)), **also)
    hard = _mask(inputs, canvas.size)
    if inputs.mask_crop is None:
        original = np.asarray(fitted(canvas, size, inputs.fit))
        mask = soft_mask(np.asarray(fitted(hard, size, inputs.fit)), inputs.mask_grow, inputs.mask_blur)
        finish = functools.partial(_finish, original=original, mask=mask, box=(0, 0, width, height))
        return Placed(pixels=original, mask=mask, **also, around=_around(inputs, original, mask), finish=finish)
    original, mask = np.asarray(canvas), soft_mask(np.asarray(hard), inputs.mask_grow, inputs.mask_blur)
    box = box_around(mask, inputs.mask_crop, width / height)
    finish = functools.partial(_finish, original=original, mask=mask, box=box)
    near, mask = np.asarray(fitted(canvas.crop(box), size, Fit.stretch)), _resized_mask(mask, box, size)
    return Placed(pixels=near, mask=mask, **also, around=_around(inputs, near, mask), finish=finish)


def blank(inputs: Inputs, width: int, height: int) -> Placed:
    """Grey pictures in the places of an item's own, the lower half of them painted: what a warm-up draws from."""
    import numpy as np

    grey = np.full((height, width, 3), 128, dtype=np.uint8)
    mask = None
    if inputs.inpaints:
        mask = np.zeros((height, width), dtype=np.float32)
        mask[height // 2 :] = 1
    return Placed(
        pixels=None if inputs.image is None else grey,
        mask=mask,
        control=None if inputs.control_image is None else grey,
        around=None if mask is None else _around(inputs, grey, mask),
    )


def _around(inputs: Inputs, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The picture with grey where the mask is at least half; None where nothing asks for it."""
    import numpy as np

    if inputs.controlnet is None or not inputs.controlnet.sees_masks:
        return None
    return np.where(mask[..., None] < 0.5, pixels.astype(np.float32), np.float32(GREY))


def fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """The picture at ``size``. Of the same size, or larger by less than is cut off, no pixel is computed anew."""
    from PIL import Image

    width, height = size
    if fit is Fit.stretch:
        return image.resize(size, Image.Resampling.LANCZOS)
    ratios = width / image.width, height / image.height
    scale = max(ratios) if fit is Fit.crop else min(ratios)
    scaled = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if fit is Fit.crop:
        scaled = max(scaled[0], width), max(scaled[1], height)
        image = image.resize(scaled, Image.Resampling.LANCZOS)
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        return image.crop((left, top, left + width, top + height))
    scaled = min(scaled[0], width), min(scaled[1], height)
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (width - scaled[0]) // 2, (height - scaled[1]) // 2
    return extended(image, (left, top, width - scaled[0] - left, height - scaled[1] - top))


def extended(image: Image.Image, sides: tuple[int, int, int, int]) -> Image.Image:
    """The picture with its edge continued by so many pixels at the left, top, right and bottom."""
    import numpy as np
    from PIL import Image

    if not any(sides):
        return image
    left, top, right, bottom = sides
    pixels = np.asarray(image)
    widths = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))


def _mask(inputs: Inputs, size: tuple[int, int]) -> Image.Image:
    """White where the canvas is painted anew: the mask, and what is added around the picture."""
    from PIL import Image

    left, top, right, bottom = inputs.outpaint
    inner = size[0] - left - right, size[1] - top - bottom
    mask = Image.new("L", size, "white")
    within = Image.new("L", inner, "black") if inputs.mask is None else load(inputs.mask, is_mask=True)
    mask.paste(within.resize(inner, Image.Resampling.BILINEAR), (left, top))
    return mask


def _resized_mask(mask: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    import numpy as np
    from PIL import Image

    left, top, right, bottom = box
    return np.asarray(Image.fromarray(mask[top:bottom, left:right]).resize(size, Image.Resampling.BILINEAR))


def _finish(drawn: np.ndarray, *, original: np.ndarray, mask: np.ndarray, box: Box) -> np.ndarray:
    """uint8 [height, width, 3]: what was drawn in ``box`` where the mask is, the original elsewhere, exactly."""
    import numpy as np
    from PIL import Image

    left, top, right, bottom = box
    inside = np.s_[top:bottom, left:right]
    patch = np.asarray(Image.fromarray(drawn).resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    share = mask[inside][..., None]
    blended = patch * share + original[inside] * (1 - share)
    finished = original.copy()
    finished[inside] = np.where(share > 0, np.rint(blended), original[inside]).astype(np.uint8)
    return finished
