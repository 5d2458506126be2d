"""A WebDataset tar file that grows by whole samples: ``000000003.png``, ``.txt`` (the prompt) and ``.json``.

Keys are five digits of the shard and four of the sample, as img2dataset writes them. The JSON is img2dataset's, with
the picture's whole record as its last field. A file without the end mark of tar can be read as far as it goes.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from typing import Any

from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import open_file
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.place import SHARDS, Place
from zimage_runner.outputs.shard_tables import as_img2dataset, fields_of_record

BLOCK = tarfile.BLOCKSIZE
_RECORD = b',"record":'


def tar_name(number: int) -> str:
    """Of a shard, relative to the run directory."""
    return f"{SHARDS}/{number:05d}.tar"


def key_of(number: int, sample: int) -> str:
    """Name of a sample: WebDataset groups files by it."""
    return f"{number:05d}{sample:04d}"


def start_of(place: Place) -> int:
    """Where the sample begins in its tar file: the picture's header is there."""
    return place.offset - BLOCK


def end_of(place: Place) -> int:
    """Where the sample ends in its tar file: after the JSON, whose last field is the record."""
    end = place.record_offset + place.record_bytes + 1
    return end + -end % BLOCK


def closed_size(end: int) -> int:
    """Bytes of a tar file whose samples end there, with the end mark."""
    size = end + 2 * BLOCK
    return size + -size % tarfile.RECORDSIZE


def sample(number: int, place: int, picture: bytes, suffix: str, record: dict[str, Any], text: bytes) -> list[bytes]:
    """The parts of a sample: picture, prompt, JSON, each with its header and padding. ``text``: ``record`` as JSON."""
    key = key_of(number, place)
    fields = fields_of_record(record)
    head = compact_json(as_img2dataset(fields, key)).encode()
    caption = str(fields["text"]).encode("utf-8", "replace")
    described = head[:-1] + _RECORD + text + b"}"
    return [*_member(key + suffix, picture), *_member(f"{key}.txt", caption), *_member(f"{key}.json", described)]


def _member(name: str, data: bytes) -> list[bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]


@dataclass
class OpenTar:
    """A shard that is being written, by one thread at a time."""

    fd: int
    number: int
    count: int = 0
    end: int = 0

    @classmethod
    def create(cls, dir_fd: int, number: int) -> OpenTar:
        """A new one. Raises FileExistsError where there is one, OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        return cls(open_file(dir_fd, tar_name(number), flags), number)

    @classmethod
    def reopen(cls, dir_fd: int, number: int, count: int, end: int) -> OpenTar:
        """An earlier one, cut back to its first ``count`` samples, which end at ``end``. Raises OSError."""
        fd = open_file(dir_fd, tar_name(number), os.O_RDWR | os.O_APPEND)
        if os.fstat(fd).st_size != end:
            os.ftruncate(fd, end)
        return cls(fd, number, count, end)

    @property
    def name(self) -> str:
        """Relative to the run directory."""
        return tar_name(self.number)

    def has_room(self, size: int, pictures: int, megabytes: float) -> bool:
        """Whether a sample of that many bytes fits within the bounds; a single larger one always does."""
        return not self.count or (self.count < pictures and self.end + size <= megabytes * 1e6)

    def append(self, picture: bytes, suffix: str, record: dict[str, Any], text: bytes) -> tuple[str, Place]:
        """Add a sample, whole or not at all. Return its key and place. Raises OSError."""
        if os.fstat(self.fd).st_nlink == 0:
            raise FileNotFoundError(2, "the shard was deleted")
        parts = sample(self.number, self.count, picture, suffix, record, text)
        data = b"".join(parts)
        try:
            atomic.write_all(self.fd, data)
        except OSError:
            os.ftruncate(self.fd, self.end)  # a full disk takes part of a sample
            raise
        described = sum(map(len, parts[:-1]))  # up to the end of the JSON
        place = Place(self.name, self.end + BLOCK, self.end + described - 1 - len(text), len(text))
        key = key_of(self.number, self.count)
        self.count, self.end = self.count + 1, self.end + len(data)
        return key, place

    def finish(self) -> None:
        """Write the end mark."""
        atomic.write_all(self.fd, bytes(closed_size(self.end) - self.end))

    def close(self) -> None:
        """Harmless when called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
