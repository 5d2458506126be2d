"""Pictures that items start from, encoded once however many seeds are drawn of each; what is kept of them in the end.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zimage_runner.engines.base import Engine, PendingImages

if TYPE_CHECKING:
    import numpy as np

    from zimage_runner.engines.request import Posterior
    from zimage_runner.pictures.placed import Placed

KEPT = 8
"""Pictures whose latents are remembered: half a megabyte each at 1024x1024."""


class Posteriors:
    """Gives the latents' distribution of pixels, encoded one picture at a time: rounding depends on the batch."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self._known: OrderedDict[int, tuple[np.ndarray, Posterior]] = OrderedDict()

    def __call__(self, pixels: np.ndarray) -> Posterior:
        """uint8 [height, width, 3]; the same array (not an equal one) is encoded once."""
        key = id(pixels)
        if key not in self._known:
            self._known[key] = pixels, self._engine().encode_picture(pixels)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key][1]

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


class FinishedImages(PendingImages):
    """Inpainted pictures: what was drawn where the mask is, the originals elsewhere."""

    def __init__(self, drawn: PendingImages, placed: Sequence[Placed]) -> None:
        self._drawn, self._placed = drawn, placed

    def wait(self) -> np.ndarray:
        import numpy as np

        pictures = self._drawn.wait()
        return np.stack([one.finish(p) if one.finish else p for one, p in zip(self._placed, pictures, strict=True)])
