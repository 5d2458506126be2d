"""A word before gigabytes are downloaded to a machine that would need an hour for a picture. Imports no torch."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from zimage_runner.engines.base import Device, EngineConfig
from zimage_runner.model import Model, Source

log = logging.getLogger(__name__)

DEVICE_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Of NVIDIA's driver, of Windows' in WSL, and of AMD's."""


def warn_without_gpu(model: Model, engine: EngineConfig, exists: Callable[[str], bool] = os.path.exists) -> None:
    """Warn of a hub's model that the CPU would draw because there is no GPU; ``engine.device=cpu`` asks for that."""
    from_hub = model.source in (Source.modelscope, Source.huggingface) and model.path is None
    if not from_hub or engine.device is not Device.auto or not sys.platform.startswith("linux"):
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or not any(map(exists, DEVICE_NODES)):
        log.warning(
            "no GPU is seen here, and %s takes many minutes a picture on a CPU: model=zimage_nano is made for CPUs "
            "(engine.device=cpu says that it is meant, without this line)",
            model.name,
        )
