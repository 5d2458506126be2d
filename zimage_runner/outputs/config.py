"""The ``output`` config group: where results go and how safely they are written."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from zimage_runner.errors import UserError, check_range


class Fsync(enum.Enum):
    """When written files are forced onto the disk. Killing the process never needs it; losing power does."""

    never = "never"
    """Leave it to the kernel. A power cut may lose or tear the last half minute of pictures."""
    run = "run"
    """Everything once, when the run ends."""
    item = "item"
    """Each picture, its record and their folder before the ledger says it is done (a few ms, off the main thread)."""


@dataclass(kw_only=True, slots=True)
class Output:
    """Where pictures and records go."""

    root: str = "outputs"
    """Folder that holds all runs."""
    png_compress_level: int = 1
    """zlib level 0 (none) to 9 (smallest). 1 looks for runs alone: on photographs as small as the usual 6, and several
    times faster. Drawings of flat colours gain from 6."""
    metadata: bool = True
    """Put the parameters into each PNG: as the text that image tools read and as JSON."""
    writer_threads: int = 2
    """Pictures encoded and written at the same time, in the background."""
    max_pending_images: int = 32
    """Pictures that may wait to be written; the run waits when the disk is slower than the model."""
    fsync: Fsync = Fsync.item
    """When files are forced onto the disk: never, run (once at the end) or item."""
    allow_constant: bool = False
    """Accept a picture of one single colour, which otherwise counts as broken and is retried."""
    min_free_gb: float = 0.5
    """The run stops, resumable, before the disk has less than this many GB free. 0 turns the check off."""
    estimated_bytes_per_pixel: float = 1.5
    """What a picture is taken to need on disk when the space for the plan is checked. 0 turns that check off."""

    def __post_init__(self) -> None:
        check_range("output.png_compress_level", self.png_compress_level, 0, 9)
        check_range("output.writer_threads", self.writer_threads, 1, 64)
        check_range("output.max_pending_images", self.max_pending_images, 1, 100_000)
        check_range("output.min_free_gb", self.min_free_gb, 0, 1e6)
        check_range("output.estimated_bytes_per_pixel", self.estimated_bytes_per_pixel, 0, 16)
        if not self.root.strip():
            raise UserError(
                "output.root='' is empty: name the folder that shall hold the runs, e.g. output.root=outputs"
            )
