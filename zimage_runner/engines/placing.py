"""``memory=auto``: the fastest placement that fits into the GPU's free memory, chosen once, when an engine loads.

The choice follows from the request and from the free memory alone, so that the thread which sends weights to the GPU
and the engine come to the same one. It changes no arithmetic. No torch at module level.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zimage_runner.engines.request import Needs
from zimage_runner.errors import UserError
from zimage_runner.memory.choice import Placed, chosen
from zimage_runner.memory.policies import Auto, Memory, Resident
from zimage_runner.memory.readings import free_gpu_bytes

if TYPE_CHECKING:
    from zimage_runner.engines.base import EngineConfig
    from zimage_runner.engines.request import LoadRequest

log = logging.getLogger(__name__)


def possible(engine: EngineConfig, request: LoadRequest) -> dict[type[Memory], int]:
    """Peaks, as ``chosen`` takes them, of the placements that an engine can draw the request with."""
    return {kind: peak for kind, peak in engine.peaks(request).items() if _is_possible(engine, request, kind)}


def _is_possible(engine: EngineConfig, request: LoadRequest, kind: type[Memory]) -> bool:
    assert isinstance(request.memory, Auto)
    memory = request.memory.taken(kind)
    if memory.staged and not memory.streamed and not request.captions:
        return False
    try:
        engine.check(Needs.like(request, memory=memory))
    except UserError:
        return False
    return True


def place(engine: EngineConfig, request: LoadRequest, device: str, free: int | None = None) -> Placed:
    """Decide where the weights go, now that the device is known, and say it where something better is missed.

    ``free``: bytes as they were read on the device before weights were sent there; None reads them now.
    """
    memory = request.memory
    if not isinstance(memory, Auto):
        return Placed(memory)
    if device != "cuda":
        return Placed(memory.taken(Resident))
    if free is None:
        import torch

        torch.cuda.init()
        free = free_gpu_bytes()
    found = chosen(memory, possible(engine, request), free)
    if found.why:
        log.log(
            logging.INFO if found.fits else logging.WARNING,
            "memory=auto takes %s: %s", found.memory.placement, found.why,
        )  # fmt: skip
    return found


def stays_resident(engine: EngineConfig, request: LoadRequest, free: int) -> bool:
    """Whether ``memory=auto`` has all networks on the device at once, with so many bytes free."""
    return isinstance(chosen(request.memory, possible(engine, request), free).memory, Resident)
