"""Which device and dtype a run uses, and a warning where there is no GPU. Imports torch when called, not before."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable

from zimage_runner.engines.base import EngineConfig
from zimage_runner.errors import UserError
from zimage_runner.model import Device, Dtype, Model, Source, names_a_file

log = logging.getLogger(__name__)

DEVICE_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Of NVIDIA's driver, of Windows' in WSL, and of AMD's."""
WORTH_COLLECTING = 1 << 28
"""Bytes of host memory."""


def choose_device(config: EngineConfig) -> str:
    """cuda or cpu. Raises UserError when CUDA is asked for and absent."""
    import torch

    available = torch.cuda.is_available()
    if config.device is Device.cuda and not available:
        build = "this torch build has no CUDA" if torch.version.cuda is None else "no CUDA GPU is visible"
        raise UserError(
            f"engine.device=cuda but {build}: use engine.device=cpu or auto, or install a CUDA build of torch"
        )
    device = Device.cuda if available and config.device is not Device.cpu else Device.cpu
    config.check_noise(device)
    return device.value


def choose_dtype(dtype: Dtype, device: str) -> str:
    """bfloat16 on GPUs; float32 on the CPU unless asked: CPUs without bf16 instructions emulate it slowly."""
    if dtype is Dtype.auto:
        return "bfloat16" if device == "cuda" else "float32"
    return dtype.value


def release(device: str, size: int) -> None:
    """Free ``size`` bytes of weights on a device that nothing refers to any more, those in circles of references too.

    Looking for circles walks over half a million objects; little memory of the host is left to Python's own collector.
    """
    if device == "cuda" or size >= WORTH_COLLECTING:
        gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def has_no_gpu(exists: Callable[[str], bool] = os.path.exists) -> bool:
    """Return whether this machine surely has no GPU for the run: no driver, or a hidden one. Imports no torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return sys.platform.startswith("linux") and (hidden or not any(map(exists, DEVICE_NODES)))


def warn_without_gpu(model: Model, engine: EngineConfig, exists: Callable[[str], bool] = os.path.exists) -> None:
    """Log a warning if the CPU would draw a hub's model because there is no GPU; ``engine.device=cpu`` asks for that.

    To be called before gigabytes are downloaded to a machine that would need an hour for a picture.
    """
    is_local = model.path is not None and not names_a_file(model.path)
    from_hub = model.source in (Source.modelscope, Source.huggingface) and not is_local
    if from_hub and engine.device is Device.auto and has_no_gpu(exists):
        log.warning(
            "no GPU is seen here, and %s takes many minutes a picture on a CPU: model=zimage_nano is made for CPUs "
            "(engine.device=cpu says that it is meant, without this line)",
            next(iter(model.places.values()), model.name),
        )
