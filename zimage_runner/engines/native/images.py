"""Pixels to uint8 pictures, and their way to the host beside the GPU's next work."""

from __future__ import annotations

import numpy as np
import torch

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


class HostCopy:
    """Pictures being copied to page-locked memory on a stream of their own."""

    def __init__(self, pixels: torch.Tensor, stream: torch.cuda.Stream) -> None:
        images, finite = to_uint8(pixels), pixels.isfinite().all()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._images = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
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


class Ready:
    """Pictures that are already on the host."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self._images, self._finite = to_uint8(pixels), pixels.isfinite().all()

    def wait(self) -> np.ndarray:
        """As HostCopy.wait."""
        return checked(self._images, self._finite)


def checked(images: torch.Tensor, finite: torch.Tensor) -> np.ndarray:
    """The pictures, unless uint8 would hide NaN or Inf as black."""
    if not finite:
        raise BadPictureError("the decoder's output holds NaN or Inf")
    return images.numpy()
