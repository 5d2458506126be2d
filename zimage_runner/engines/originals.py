"""Weights as they were before an adapter changed them: on the GPU where there is room, else in page-locked memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ROOM = 12e9
"""Bytes that must stay free on the GPU beside originals: for pictures, and for what a merge takes."""
BLOCK = 1 << 28
"""Page-locked memory is taken in pieces of a power of two, because torch would round others up to one."""
ALIGNMENT = 256


class Originals:
    """Copies of tensors by name. They stay: adapters change the same tensors again and again."""

    def __init__(self, device: torch.device) -> None:
        """``device``: where adapters are merged."""
        self._device = device
        self._kept: dict[str, tuple[torch.Tensor, ...]] = {}
        self._block: torch.Tensor | None = None
        self._used = 0

    def of(self, name: str) -> tuple[torch.Tensor, ...]:
        """The tensors as they were, wherever they are kept."""
        return self._kept[name]

    def keep(self, name: str, tensors: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Copy what ``tensors`` gives, unless it was copied before."""
        if name not in self._kept:
            self._kept[name] = tuple(self._kept_copy(part) for part in tensors())

    def to_host(self) -> bool:
        """Make room on the GPU. Return whether there was something to move."""
        import torch

        moved = False
        with torch.inference_mode():  # as when they were kept: its tensors are changed in it alone
            for name, parts in self._kept.items():
                if any(part.is_cuda for part in parts):
                    self._kept[name] = tuple(self._copy(part) if part.is_cuda else part for part in parts)
                    moved = True
        return moved

    def _kept_copy(self, part: torch.Tensor) -> torch.Tensor:
        if not part.is_cuda or self._has_room(part.nbytes):
            return part.clone()
        if self._block is None:
            log.info("the GPU is full: weights as they are without adapters are kept in host memory")
        return self._copy(part)

    def _has_room(self, nbytes: int) -> bool:
        import torch

        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused - nbytes > ROOM

    def _copy(self, part: torch.Tensor) -> torch.Tensor:
        """A copy in host memory. Only the GPU reads it again, after the work that writes it."""
        import torch

        nbytes = -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        if self._block is None or self._used + nbytes > len(self._block):
            from zimage_runner.engines.native.images import page_locked

            self._block, self._used = page_locked(torch.Size([max(BLOCK, nbytes)]), torch.uint8), 0
        place = self._block[self._used : self._used + part.nbytes].view(part.dtype).view(part.shape)
        self._used += nbytes
        place.copy_(part, non_blocking=self._block.is_pinned())
        return place
