"""Choosing device and dtype. Imports torch when called, not before."""

from __future__ import annotations

from zimage_runner.engines.base import Device
from zimage_runner.errors import UserError
from zimage_runner.model import Dtype


def choose_device(device: Device) -> str:
    """cuda or cpu. Raises UserError when CUDA is asked for and absent."""
    import torch

    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        build = "this torch build has no CUDA" if torch.version.cuda is None else "no CUDA GPU is visible"
        raise UserError(
            f"engine.device=cuda but {build}: use engine.device=cpu or auto, or install a CUDA build of torch"
        )
    return "cuda" if available and device is not Device.cpu else "cpu"


def choose_dtype(dtype: Dtype, device: str) -> str:
    """bfloat16 on GPUs; float32 on the CPU unless asked: CPUs without bf16 instructions emulate it slowly."""
    if dtype is Dtype.auto:
        return "bfloat16" if device == "cuda" else "float32"
    return dtype.value
