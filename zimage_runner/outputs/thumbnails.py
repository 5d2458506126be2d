"""Small copies of the pictures that this process drew, for the report of the run.

Made from the pixels while the picture is written: that takes a thirtieth of decoding the file again.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIDE = 160
"""Pixels of the longer side."""
QUALITY = 78
MOST = 2000
"""The latest ones are kept: a few KB each."""

_kept: OrderedDict[str, bytes] = OrderedDict()
_lock = threading.Lock()


def keep(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Remember the picture ``path`` of uint8 [height, width, 3]."""
    from PIL import Image

    data = small_jpeg(Image.fromarray(pixels))
    with _lock:
        _kept[os.path.abspath(path)] = data
        if len(_kept) > MOST:
            _kept.popitem(last=False)


def kept(path: str | os.PathLike[str]) -> bytes | None:
    """The JPEG of a picture that this process drew lately."""
    return _kept.get(os.path.abspath(path))


def small_jpeg(image: Image.Image) -> bytes:
    """An RGB image as JPEG of at most SIDE x SIDE pixels."""
    from PIL import Image

    if (factor := max(image.size) // SIDE) > 1:  # first by averaging, which takes a tenth of the time
        image = image.reduce(factor)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
