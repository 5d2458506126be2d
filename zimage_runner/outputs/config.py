"""The ``output`` config group: where results go and how safely they are written."""

from __future__ import annotations

import enum
import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any

from zimage_runner.errors import UserError, check_range


class Fsync(enum.Enum):
    """When written files are forced onto the disk. Killing the process never needs it; losing power does."""

    never = "never"
    """Leave it to the kernel. A power cut may lose or tear the last half minute of pictures."""
    run = "run"
    """Everything once, when the run ends."""
    item = "item"
    """Each picture, its record and their folder before the ledger says it is done (a few ms, off the main thread)."""


class Format(enum.Enum):
    """How pictures are encoded: file name suffix, whether there is a quality, and whether it may be lossless.

    A new one is a line here and a class in encoders.py.
    """

    png = (".png", False, False)
    jpeg = (".jpg", True, False)
    webp = (".webp", True, True)

    def __init__(self, suffix: str, has_quality: bool, may_be_lossless: bool) -> None:
        self.suffix = suffix
        self.has_quality = has_quality
        self.may_be_lossless = may_be_lossless


class Layout(enum.Enum):
    """What shards are."""

    webdataset = "webdataset"
    """Tar files with picture, prompt (.txt) and record (.json) of each item, and a table beside each, as img2dataset
    has them."""
    parquet = "parquet"
    """Parquet files with the pictures in them, as Hugging Face's ``datasets`` has them."""


OF_FILE = {"of_file": True}
"""Metadata of fields that say how a picture's file is encoded; the others are for runs."""
LOSSLESS = "lossless"
USUAL_QUALITY = 90
MOST_REPORTED = 2000
"""Pictures up to which a report is written without being asked for."""
IMAGE_STEM = "image"
"""A picture's file below its item's folder is called this, and by its format's suffix."""


@dataclass(kw_only=True, slots=True)
class Output:
    """Where pictures and records go."""

    root: str = "outputs"
    """Folder that holds all runs."""
    format: Format = field(default=Format.png, metadata=OF_FILE)
    """png, jpeg or webp. Only png, and webp with quality=lossless, keep every pixel as it was drawn."""
    quality: Any = field(default=None, metadata=OF_FILE)  # int | str
    """For jpeg and webp: 1 to 100, or lossless (webp alone); null is 90."""
    png_compress_level: int = field(default=1, metadata=OF_FILE)
    """zlib level 0 (none) to 9 (smallest). 1 looks for runs alone: on photographs as small as the usual 6, and several
    times faster. Drawings of flat colours gain from 6."""
    metadata: bool = field(default=True, metadata=OF_FILE)
    """Put the parameters into each picture: as the text that image tools read and as JSON."""
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
    report: bool | None = None
    """report.html at the end of a run or multirun: true, false, or null for those of at most 2,000 pictures."""
    estimated_bytes_per_pixel: float = 1.5
    """What a picture is taken to need on disk when the space for the plan is checked. 0 turns that check off."""

    def __post_init__(self) -> None:
        check_quality("output.quality", self.format, self.quality)
        if self.format is not Format.png and self.png_compress_level != 1:
            raise UserError(
                f"output.png_compress_level={self.png_compress_level} has no effect on {self.format.name}: "
                "leave it out, or use output.format=png"
            )
        check_range("output.png_compress_level", self.png_compress_level, 0, 9)
        check_range("output.writer_threads", self.writer_threads, 1, 64)
        check_range("output.max_pending_images", self.max_pending_images, 1, 100_000)
        check_range("output.min_free_gb", self.min_free_gb, 0, 1e6)
        check_range("output.estimated_bytes_per_pixel", self.estimated_bytes_per_pixel, 0, 16)
        if not self.root.strip():
            raise UserError(
                "output.root='' is empty: name the folder that shall hold the runs, e.g. output.root=outputs"
            )

    def reports(self, pictures: int) -> bool:
        """Whether a run of that many pictures leaves a report."""
        return wants_report(self.report, pictures)

    @property
    def image_name(self) -> str:
        """File name of each picture in its item's folder."""
        return IMAGE_STEM + self.format.suffix


READ_BACK = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "hf", "memory"))
"""Stores that pictures are read from where a run directory says so, which may be somebody else's: no files, no HTTP."""
MOST_IN_A_SHARD = 10_000
"""Keys have four digits for the picture."""


@dataclass(kw_only=True, slots=True)
class Shards(Output):
    """Pictures and their records in few large files below the run directory (``shards/``)."""

    layout: Layout = Layout.webdataset
    """webdataset (tar files, with .txt and .json) or parquet (written as tar files first: twice as much is written)."""
    shard_pictures: int = MOST_IN_A_SHARD
    """Pictures in a shard, at most."""
    shard_mb: float = 1000.0
    """Megabytes of a shard, at most; a single larger picture has one of its own."""
    upload: str | None = None
    """Where shards are copied once they are full, and the rest at the end: s3://bucket/folder, or what fsspec opens."""
    keep: bool = True
    """Keep shards here too once they are uploaded. Without, they are read from where they were uploaded to."""

    def __post_init__(self) -> None:
        Output.__post_init__(self)
        check_range("output.shard_pictures", self.shard_pictures, 1, MOST_IN_A_SHARD)
        check_range("output.shard_mb", self.shard_mb, 0.001, 1e6)
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError("output=shards needs pyarrow, for tables: pip install 'zimage-runner[parquet]'")
        if self.upload is None:
            if not self.keep:
                raise UserError("output.keep=false needs output.upload=s3://...: pictures would be lost")
            return
        if not re.fullmatch(r"[a-z][a-z0-9+]*://\S*[^/\s]\S*", self.upload):
            raise UserError(f"output.upload={self.upload}: write an address, e.g. output.upload=s3://bucket/folder")
        if importlib.util.find_spec("fsspec") is None:
            raise UserError("output.upload needs fsspec: pip install 'zimage-runner[s3]'")
        protocol = self.upload.partition("://")[0]
        if not self.keep and protocol not in READ_BACK:
            raise UserError(f"output.keep=false: pictures are not read back from {protocol}://: leave keep out")


def wants_report(report: bool | None, pictures: int) -> bool:
    """What ``output.report`` says of a run or multirun of that many pictures."""
    return 0 < pictures <= MOST_REPORTED if report is None else report


def check_quality(field: str, format: Format, quality: object) -> None:
    """Raise UserError for a quality that this format has not; None is every format's usual one."""
    if quality is None or (quality == LOSSLESS and format.may_be_lossless):
        return
    if not format.has_quality:
        raise UserError(
            f"{field}={quality} has no effect on {format.name.upper()}, which loses nothing: use jpeg or webp with it"
        )
    if type(quality) is not int or not 1 <= quality <= 100:
        or_lossless = f" or {LOSSLESS}" if format.may_be_lossless else ""
        raise UserError(f"{field}={quality}: write a whole number from 1 to 100{or_lossless}")
