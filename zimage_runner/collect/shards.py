"""Pictures of many folders in few files, as those read them who train on pictures: WebDataset tar files, or Parquet.

WebDataset: ``00000.tar`` holds ``000000000.png``, ``.txt`` (the prompt) and ``.json`` of each picture, and
``00000.parquet`` the same fields as a table; keys are five digits of the shard and four of the picture, as img2dataset
writes them. Parquet: ``data/train-00000-of-00012.parquet`` with a column ``image`` (bytes and path) that Hugging Face's
``datasets`` shows as pictures.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.collect.folder import LOCK, conversion_of, each_once, held, row_of, suffix_of
from zimage_runner.collect.pictures import Picture
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import MOST_IN_A_SHARD, Output
from zimage_runner.outputs.encoders import convert
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.shard_tables import GROUP_BYTES, as_img2dataset, index_schema, picture_schema

NAME = "{run}_{job}_{index:05d}_{slug}_seed_{seed}"
"""Tells apart what is collected; no file is called so."""
OWN = re.compile(r"[0-9]{5}\.(tar|parquet)|train-[0-9]{5}-of-[0-9]{5}\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """When the next shard begins."""

    pictures: int = MOST_IN_A_SHARD
    megabytes: float = 1000.0
    """Of picture files before a conversion; a single larger one has a shard of its own."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with what is known of it."""

    picture: Picture
    row: dict[str, Any]
    output: Output | None

    def data(self) -> bytes:
        """Return the picture's file, converted where that is asked for. Raises OSError."""
        with self.picture.image.open() as stream:
            wanted = conversion_of(self.picture, self.output)
            return stream.read() if wanted is None else convert(stream, wanted)


def collect_shards(
    folder: Path, pictures: Sequence[Picture], layout: str, bounds: Bounds, *, overwrite: bool, output: Output | None
) -> tuple[int, int]:
    """Write all pictures into ``folder``, in this layout (webdataset or parquet). Return how many shards and pictures.

    Each file appears whole. Raises UserError where ``folder`` has something already, unless ``overwrite``; OSError.
    """
    if importlib.util.find_spec("pyarrow") is None:  # the tables need it
        raise UserError(f"layout={layout} needs pyarrow: pip install 'zimage-runner[parquet]'")
    rows = [row_of(picture, NAME, suffix_of(picture, output)) for picture in pictures]
    pictures, rows = each_once(pictures, rows)
    samples = [Sample(picture, row, output) for picture, row in zip(pictures, rows, strict=True)]
    target = folder / "data" if layout == "parquet" else folder
    with held(target):
        _make_empty(target, overwrite=overwrite)
        shards = list(_split(samples, bounds))
        for number, shard in enumerate(shards):
            if layout == "parquet":
                _write_parquet(target / f"train-{number:05d}-of-{len(shards):05d}.parquet", shard)
            else:
                _write_tar(target, number, shard)
    return len(shards), len(samples)


def _make_empty(folder: Path, *, overwrite: bool) -> None:
    there = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
    # What is not finished is of a call that was killed: no other one writes there now.
    finished = [name for name in there if not atomic.is_own_temporary(name)]
    if finished and not overwrite:
        raise UserError(f"{folder} has {finished[0]} already: use another folder, or overwrite=true")
    foreign = [name for name in finished if not OWN.fullmatch(name)]
    if foreign:
        raise UserError(f"{folder} has {foreign[0]}, which is no shard: use another folder")
    for name in there:
        (folder / name).unlink()


def _split(samples: Sequence[Sample], bounds: Bounds) -> Iterator[list[Sample]]:
    shard: list[Sample] = []
    size = 0
    for sample in samples:
        bytes_ = sample.picture.size
        if shard and (len(shard) >= bounds.pictures or size + bytes_ > bounds.megabytes * 1e6):
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += bytes_
    if shard:
        yield shard


def _write_tar(folder: Path, number: int, shard: Sequence[Sample]) -> None:
    """The table is there first, so a tar file has one."""
    records: list[dict[str, Any]] = []
    with _whole(folder / f"{number:05d}.tar") as (temporary, finish):
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for n, sample in enumerate(shard):
                key = f"{number:05d}{n:04d}"
                record = as_img2dataset(_fields(sample), key)
                records.append(record)
                suffix = suffix_of(sample.picture, sample.output)
                for name, data in (
                    (f"{key}{suffix}", sample.data()),
                    (f"{key}.txt", record["caption"].encode()),
                    (f"{key}.json", json.dumps(record, ensure_ascii=False).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        import pyarrow
        import pyarrow.parquet

        with _whole(folder / f"{number:05d}.parquet") as (table, finish_table):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, index_schema()), table)
            finish_table()
        finish()


def _write_parquet(path: Path, shard: Sequence[Sample]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = picture_schema()
    group: list[dict[str, Any]] = []
    size = 0
    with _whole(path) as (temporary, finish):
        with pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=False) as writer:
            for sample in shard:
                data = sample.data()
                name = Path(sample.row["file_name"]).with_suffix(suffix_of(sample.picture, sample.output)).name
                group.append({"image": {"bytes": data, "path": name}, **_fields(sample)})
                size += len(data)
                if size >= GROUP_BYTES:
                    writer.write_table(pyarrow.Table.from_pylist(group, schema))
                    group, size = [], 0
            if group:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
        finish()


class _whole:
    """A file that has its name only once it is whole: (temporary path, what gives it the name)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(atomic.own_temporary(path.name))

    def __enter__(self) -> tuple[Path, Callable[[], None]]:
        return self._temporary, lambda: os.replace(self._temporary, self._path)

    def __exit__(self, *_: object) -> None:
        self._temporary.unlink(missing_ok=True)


def _fields(sample: Sample) -> dict[str, Any]:
    """What both layouts say of a picture, beside the picture."""
    row = sample.row
    return {
        "text": row["text"],
        "seed": row["seed"],
        "id": row.get("id"),
        "width": row.get("width"),
        "height": row.get("height"),
        "model": row["model"],
        "source": row["source"],
        "record": compact_json({k: v for k, v in row.items() if k not in ("file_name", "source")}),
    }
