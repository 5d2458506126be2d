"""Reading and writing a stretch of a weights file, whole, from and to memory that is already there."""

from __future__ import annotations

import os
from pathlib import Path


def read_exactly(descriptor: int, offset: int, memory: memoryview, path: Path) -> None:
    """Fill ``memory`` (bytes) from ``offset`` of an open file; the GIL is free while the kernel copies.

    ``path`` is for the message alone. Raises OSError where the file ends early.
    """
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            # Where it ends, not where this read began: another thread's stretch may hold the end.
            raise OSError(f"{path} ended at byte {os.fstat(descriptor).st_size} while it was read")
        done += count


def write_exactly(descriptor: int, offset: int, memory: memoryview) -> None:
    """Write all of ``memory`` (bytes) at ``offset`` of an open file."""
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)
