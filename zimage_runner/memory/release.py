"""Giving back what torch keeps of the GPU's memory without needing it."""

from __future__ import annotations

import gc
import sys
from typing import Any


def release_unused() -> None:
    """Give all cached memory back to the GPU, so that fragments do not make the next try fail as well.

    cuBLAS' work areas are given back too: 8 to 64 MB for each stream that multiplied matrices, made anew when needed.
    Does nothing but collect garbage where torch has not used a GPU.
    """
    gc.collect()  # an error's traceback may hold tensors in a cycle
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
