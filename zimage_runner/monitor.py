"""Readings: GPU memory, library versions. Nothing here imports torch; it is read only where it is loaded already."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from zimage_runner import __version__

GB = 1e9
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "hydra-core")


def gpu_memory() -> dict[str, float]:
    """GB (1e9 bytes) allocated and reserved by this process on its current GPU, now and at most; {} without a GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    stats = torch.cuda.memory_stats()
    return {
        "allocated_gb": stats["allocated_bytes.all.current"] / GB,
        "reserved_gb": stats["reserved_bytes.all.current"] / GB,
        "peak_allocated_gb": stats["allocated_bytes.all.peak"] / GB,
        "peak_reserved_gb": stats["reserved_bytes.all.peak"] / GB,
    }


def peak_host_gb() -> float:
    """Most resident memory this process has had, in GB (1e9 bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def versions() -> dict[str, str]:
    """Versions of this package and of what decides pixels."""
    found = {"zimage_runner": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
