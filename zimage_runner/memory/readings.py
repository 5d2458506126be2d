"""Readings: GPU memory, library versions; and giving memory back. Nothing here imports torch; it is used only where it
is loaded already."""

from __future__ import annotations

import contextlib
import functools
import gc
import platform
import sys
from typing import Any

from zimage_runner import GB, __version__

LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "hydra-core")
MEMORY_MARGIN = 0.85
"""Share of the free memory that engine.batch_size=auto plans with; fragments take some of the rest."""

_peaks_before_reset = {"peak_allocated_gb": 0.0, "peak_reserved_gb": 0.0}


def gpu_memory() -> dict[str, float]:
    """GB (1e9 bytes) allocated and reserved by this process on its current GPU, now and at most; {} without a GPU."""
    torch = _torch_with_gpu()
    if torch is None:
        return {}
    stats = torch.cuda.memory_stats()
    # Preloaded weights lie outside torch's allocator; they are there from before its first allocation to the end.
    driver = sys.modules.get("zimage_runner.weights.preload.cuda_driver")
    outside = driver.allocated_bytes() if driver is not None else 0
    reading = {
        "allocated_gb": (stats["allocated_bytes.all.current"] + outside) / GB,
        "reserved_gb": (stats["reserved_bytes.all.current"] + outside) / GB,
        "peak_allocated_gb": (stats["allocated_bytes.all.peak"] + outside) / GB,
        "peak_reserved_gb": (stats["reserved_bytes.all.peak"] + outside) / GB,
    }
    return reading | {name: max(before, reading[name]) for name, before in _peaks_before_reset.items()}


def free_gpu_bytes() -> int:
    """Bytes this process may still allocate on its GPU: free ones, its own cache, within its memory fraction."""
    torch = _torch_with_gpu()
    if torch is None:
        return 0
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    free += torch.cuda.memory_reserved() - allocated
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return int(min(free, fraction * total - allocated))


class BatchMemory:
    """What one picture needs: made before it is drawn, asked after it."""

    def __init__(self) -> None:
        self._torch = _torch_with_gpu()
        if self._torch is not None:
            _peaks_before_reset.update({k: v for k, v in gpu_memory().items() if k in _peaks_before_reset})
            self._torch.cuda.reset_peak_memory_stats()
            self._before = self._torch.cuda.memory_allocated()

    def pictures_that_fit(self, most: int) -> int:
        """How many pictures like the one just drawn fit at once, 1 to ``most``; 1 without a GPU."""
        if self._torch is None:
            return 1
        one = max(1, self._torch.cuda.max_memory_allocated() - self._before)
        return max(1, min(most, int(free_gpu_bytes() * MEMORY_MARGIN / one)))


def release_unused() -> None:
    """Give all cached memory back to the GPU, so that fragments do not make the next try fail as well.

    cuBLAS' work areas are given back too: 8 to 64 MB for each stream that multiplied matrices, made anew when needed.
    Does nothing but collect garbage where torch has not used a GPU.
    """
    gc.collect()  # an error's traceback may hold tensors in a cycle
    torch = _torch_with_gpu()
    if torch is None:
        return
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def peak_host_gb() -> float:
    """Most resident memory this process has had, in GB (1e9 bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def forget_peaks() -> None:
    """Let the peaks begin anew, for a process that does the run of another program after the last one's."""
    for name in _peaks_before_reset:
        _peaks_before_reset[name] = 0.0
    torch = _torch_with_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the most resident memory


def versions() -> dict[str, str]:
    """Versions of this package and of what decides pixels."""
    return {"zimage_runner": __version__, "python": platform.python_version(), **_installed()}


@functools.cache  # each is a file that is parsed, and a process loads the same ones to its end
def _installed() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_with_gpu() -> Any:
    """torch if it is loaded and has used a GPU already, else None."""
    torch: Any = sys.modules.get("torch")
    # Another thread may be importing torch, which has no torch.cuda then and has used no GPU.
    if torch is None or getattr(getattr(torch, "__spec__", None), "_initializing", False):
        return None
    return torch if torch.cuda.is_available() and torch.cuda.is_initialized() else None
