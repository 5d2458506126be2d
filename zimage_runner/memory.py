"""How GPU memory is allocated and where the model's parts live: the ``memory`` config group."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from zimage_runner.errors import UserError

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Memory:
    """Settings shared by every placement."""

    alloc_conf: str | None = None
    """Verbatim PYTORCH_CUDA_ALLOC_CONF, e.g. ``expandable_segments:True``; null keeps the environment's."""
    per_process_fraction: float | None = None
    """Share of the GPU's memory this process may allocate, 0 < f <= 1; null sets no limit."""

    def apply_environment(self) -> None:
        """Export the allocator settings; call before importing torch: they count only before CUDA's first allocation."""
        if self.alloc_conf is None:
            return
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            log.warning("memory.alloc_conf has no effect: torch's CUDA allocator is already initialised")
            return
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = self.alloc_conf

    def apply_limits(self, device: str) -> None:
        """Apply limits that need torch, before the model is loaded."""
        if self.per_process_fraction is not None and device == "cuda":
            import torch

            torch.cuda.set_per_process_memory_fraction(self.per_process_fraction)


@dataclass(kw_only=True, slots=True)
class Resident(Memory):
    """Everything stays on the device: fastest, and the default."""

    def __post_init__(self) -> None:
        check_fraction(self.per_process_fraction)


def check_fraction(fraction: float | None) -> None:
    """Shared by the leaf classes: zero-argument super() fails in slots dataclasses on Python 3.11."""
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"memory.per_process_fraction={fraction} is out of range: use more than 0 and at most 1")
