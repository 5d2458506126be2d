"""Finished shards: the end mark and the table of a tar file, Parquet files made of one, and shards written anew.

What is rewritten is there as a whole and safe from power cuts, and the ledger has the new places, before the old file
goes. So a process that ends in between leaves two files, and the ledger says which of them counts.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.ledger import Entry, Ledger
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import SHARDS, TAR, Place, fields_of, read_piece
from zimage_runner.outputs.shard_tables import (
    GROUP_BYTES,
    as_img2dataset,
    fields_of_record,
    index_schema,
    picture_schema,
)
from zimage_runner.outputs.shard_tar import OpenTar, closed_size, end_of, key_of

OF_LINE = ("item", "status", "index", "seed", "fingerprint", "image", "sha256", "bytes")
"""What a record and its line in the ledger have in common, before the picture's place."""
ALSO_OF_LINE, OF_REUSED = ("pixels_sha256", "seconds", "timings", "written"), ("reused_from", "written")
"""And after it."""

Sample = tuple[bytes, bytes, dict[str, Any]]
"""A picture's file, its record as JSON, and that read."""


class Kept(NamedTuple):
    """A picture that the ledger has in a shard."""

    item: str
    entry: Entry

    @property
    def place(self) -> Place:
        assert self.entry.place is not None
        return self.entry.place


def index_name(number: int) -> str:
    """Of the table beside a tar file."""
    return f"{SHARDS}/{number:05d}.parquet"


def parquet_name(number: int) -> str:
    """Of a Parquet file that holds pictures."""
    return f"{SHARDS}/train-{number:05d}.parquet"


def line_of_record(record: dict[str, Any], place: Place, key: str) -> dict[str, Any]:
    """The ledger's line of a picture that is in a shard."""
    head = {name: record[name] for name in OF_LINE}
    more = OF_REUSED if "reused_from" in record else ALSO_OF_LINE
    return head | fields_of(place, key) | {name: record[name] for name in more if name in record}


def finish_tar(dir_fd: int, number: int, samples: Sequence[Kept], *, sync: bool) -> None:
    """End the tar file of these samples, in their order, and write its table. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    end = end_of(samples[-1].place)
    with contextlib.closing(OpenTar.reopen(dir_fd, number, len(samples), end)) as tar:
        tar.finish()
        if sync:
            os.fsync(tar.fd)
        rows = []
        for n, (text, record) in enumerate(_records(tar.fd, samples)):
            rows.append({**as_img2dataset(fields_of_record(record), key_of(number, n)), "record": text.decode()})
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, index_schema()), table)
    atomic.write_file(dir_fd, index_name(number), table.getvalue(), sync=sync)
    if sync:
        atomic.sync_dir(dir_fd, SHARDS)


def rewrite(dir_fd: int, ledger: Ledger, number: int, samples: Sequence[Kept], *, as_parquet: bool) -> None:
    """Write samples into a new shard of that number, tell the ledger, and remove the shard that they were in.

    Raises OSError, RunStopped.
    """
    old = samples[0].place.shard
    lines = (_to_parquet if as_parquet else _to_tar)(dir_fd, number, samples)
    atomic.sync_dir(dir_fd, SHARDS)
    ledger.append_all(lines, sync=True)
    remove(dir_fd, old)


def remove(dir_fd: int, shard: str) -> None:
    """Remove a shard and the table beside it. Raises OSError."""
    with atomic.directory(SHARDS, dir_fd) as folder:
        if (tar := TAR.fullmatch(shard)) is not None:
            atomic.remove(folder, index_name(int(tar[1])).rpartition("/")[2])
        atomic.remove(folder, shard.rpartition("/")[2])


def _records(fd: int, samples: Iterable[Kept]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for kept in samples:
        place = kept.place
        text = read_piece(fd, place.record_offset, place.record_bytes, place.shard)
        try:
            record = from_json(text)
        except ValueError:
            record = {}
        if not isinstance(record, dict) or record.get("sha256") != kept.entry.sha256:
            raise OSError(errno.EIO, f"{kept.item}: its record changed: resume with verify=true")
        yield text, record


def _pictures(fd: int, samples: Iterable[Kept]) -> Iterator[Sample]:
    for kept in samples:
        picture = read_piece(fd, kept.place.offset, kept.entry.size, kept.place.shard)
        text, record = next(_records(fd, [kept]))
        yield picture, text, record


def _to_tar(dir_fd: int, number: int, samples: Sequence[Kept]) -> list[dict[str, Any]]:
    lines = []
    with (
        os.fdopen(beneath.open_file(dir_fd, samples[0].place.shard), "rb") as source,
        contextlib.closing(OpenTar.create(dir_fd, number)) as tar,
    ):
        for picture, text, record in _pictures(source.fileno(), samples):
            key, place = tar.append(picture, _suffix(record), record, text)
            lines.append(line_of_record(record, place, key))
        os.fsync(tar.fd)
    return lines


def _to_parquet(dir_fd: int, number: int, samples: Sequence[Kept]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    schema, name = picture_schema(), parquet_name(number)
    base = name.rpartition("/")[2]
    groups: list[list[Sample]] = []
    with (
        atomic.directory(SHARDS, dir_fd) as folder,
        os.fdopen(beneath.open_file(dir_fd, samples[0].place.shard), "rb") as source,
    ):
        temporary = base + atomic.TMP_SUFFIX
        fd = atomic.create(folder, temporary)
        try:
            # Nothing packed, and no dictionary: each picture stands in the file as it is, and can be read alone.
            with pyarrow.parquet.ParquetWriter(_Raw(fd), schema, use_dictionary=False, compression="none") as writer:
                done = 0
                for group in _groups(_pictures(source.fileno(), samples)):
                    rows = [_row(*found, key_of(number, done + n)) for n, found in enumerate(group)]
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    groups.append([(b"", text, record) for _, text, record in group])
                    done += len(group)
            os.fsync(fd)
            places = _find(folder, temporary, name, samples, groups, source.fileno())
            os.rename(temporary, base, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            atomic.remove(folder, temporary)
            raise
        finally:
            os.close(fd)
    records = [record for group in groups for _, _, record in group]
    return [
        line_of_record(record, place, key_of(number, n))
        for n, (record, place) in enumerate(zip(records, places, strict=True))
    ]


def _groups(pictures: Iterable[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    size = 0
    for found in pictures:
        group.append(found)
        size += len(found[0])
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row(picture: bytes, text: bytes, record: dict[str, Any], key: str) -> dict[str, Any]:
    image = {"bytes": picture, "path": key + _suffix(record)}
    return {"image": image, **fields_of_record(record), "record": text.decode()}


def _find(
    folder: int, temporary: str, name: str, samples: Sequence[Kept], groups: Sequence[Sequence[Sample]], source: int
) -> list[Place]:
    """Where the pictures and records stand in a Parquet file: of each group first all pictures, then all records."""
    places = []
    with (
        os.fdopen(beneath.open_file(folder, temporary), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as written,
    ):
        end, done = 0, 0
        for group in groups:
            kept = samples[done : done + len(group)]
            offsets = []
            for one in kept:
                picture = read_piece(source, one.place.offset, one.entry.size, one.place.shard)
                offsets.append(_position(written, picture, end))
                end = offsets[-1] + len(picture)
            for offset, (_, text, _) in zip(offsets, group, strict=True):
                record = _position(written, text, end)
                end = record + len(text)
                places.append(Place(name, offset, record, len(text)))
            done += len(group)
    return places


def _position(written: mmap.mmap, data: bytes, start: int) -> int:
    found = written.find(data, start)
    if found < 0:
        raise OSError(errno.EIO, "a picture does not stand in the Parquet file as it is")
    return found


def _suffix(record: dict[str, Any]) -> str:
    return "." + str(record["image"]).rpartition(".")[2]


class _Raw(io.RawIOBase):
    """A descriptor as a file for pyarrow; it is left open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        atomic.write_all(self._fd, view)
        self._at += len(view)
        return len(view)


def is_closed(size: int, end: int) -> bool:
    """Whether a tar file of ``size`` bytes whose samples end at ``end`` has its end mark."""
    return size == closed_size(end)
