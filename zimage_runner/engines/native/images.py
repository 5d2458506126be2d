"""Pixels to uint8 pictures, and their way to the host beside the GPU's next work."""

from __future__ import annotations

import numpy as np
import torch

from zimage_runner.engines.base import PendingImages
from zimage_runner.engines.faults import is_out_of_memory
from zimage_runner.errors import BadPictureError


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[batch, 3, height, width] in -1..1 to uint8 [batch, height, width, 3], rounded as diffusers rounds."""
    scaled = pixels.float().mul_(0.5).add_(0.5) if pixels.dtype != torch.float32 else pixels * 0.5 + 0.5
    return (
        scaled.clamp_(0, 1)
        .mul_(255)
        .round_()
        .permute(0, 2, 3, 1)
        .to(torch.uint8, memory_format=torch.contiguous_format)
    )


def page_locked(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Host memory that the GPU can copy to while the host goes on; pageable where the system allows no more of it."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return torch.empty(shape, dtype=dtype)  # a copy to it makes the host wait, and is otherwise the same


class HostCopy(PendingImages):
    """Pictures being copied to page-locked memory on a stream of their own."""

    def __init__(self, pixels: torch.Tensor, stream: torch.cuda.Stream) -> None:
        images, finite = to_uint8(pixels), pixels.isfinite().all()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._images = page_locked(images.shape, torch.uint8)
            self._finite = page_locked(finite.shape, torch.bool)
            self._images.copy_(images, non_blocking=True)
            self._finite.copy_(finite, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        for tensor in (images, finite):
            tensor.record_stream(stream)

    def wait(self) -> np.ndarray:
        """Block until copied. Raises BadPictureError if the decoder's output holds NaN or Inf."""
        self._done.synchronize()
        return checked(self._images, self._finite)


class Ready(PendingImages):
    """Pictures that are on the host once this is made."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self._images, self._finite = to_uint8(pixels).cpu(), pixels.isfinite().all()

    def wait(self) -> np.ndarray:
        """As HostCopy.wait."""
        return checked(self._images, self._finite)


def checked(images: torch.Tensor, finite: torch.Tensor) -> np.ndarray:
    """The pictures, unless uint8 would hide NaN or Inf as black."""
    if not finite:
        raise BadPictureError(
            "the decoder's output holds NaN or Inf (numbers overflowed: is the checkpoint damaged or badly merged, a "
            "LoRA's weight or guidance_scale too large?)"
        )
    return images.numpy()
