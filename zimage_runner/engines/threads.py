"""torch's threads on the CPU: how many there are, and how they wait for work. Imports torch when called, not before."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from zimage_runner.engines.base import EngineConfig

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user may have set to say how OpenMP's threads wait: the standard, GNU's, and Intel's and LLVM's variable."""
SPINS = "2000"
"""Looks that GNU's threads take before they sleep: fewer cost a process that is alone, more cost two that share a CPU
(benchmarks/cpu_sharing.py)."""
MOST = 1024


def wait_passively() -> None:
    """Before torch is imported: threads that wait for work soon sleep, unless the user has set it otherwise.

    torch's wheels for Linux bring GNU's OpenMP, whose threads spin for milliseconds and so take the CPU from whatever
    else runs: beside other work the embedded model was several times slower. It reads the variable when it is loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPINS}


def thread_count() -> int:
    """Threads that torch computes with here and now."""
    import torch

    return torch.get_num_threads()


@contextlib.contextmanager
def threads_of(config: EngineConfig) -> Iterator[None]:
    """Let torch compute with ``engine.threads`` threads while the block runs; null: as many as it does by itself."""
    if config.threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
