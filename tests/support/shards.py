"""Runs with shards as processes write them, and what is in them, read by other readers than ours."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tests.support.written_runs import noise_pictures, request
from zimage_runner.engines.base import ReadyImages
from zimage_runner.outputs.config import Fsync, Output, Shards
from zimage_runner.outputs.finished import Finished
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.writer import Outcome, Writer


def digests(run: Path) -> list[str]:
    """sha256 of every picture in every shard."""
    found: list[bytes] = []
    for path in sorted((run / "shards").iterdir()):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    found += [file.read()] if member.name.endswith((".png", ".jpg", ".webp")) else []
        elif path.name.startswith("train-"):
            found += [row["bytes"] for row in pyarrow.parquet.read_table(path)["image"].to_pylist()]
    return sorted(hashlib.sha256(data).hexdigest() for data in found)


def check_shards(run: Path) -> None:
    """Each picture of the ledger once, and no others; each table names what its tar file has."""
    entries = {item: entry for item, entry in Ledger.load(run / RECORDS).entries.items() if entry.ok}
    assert digests(run) == sorted(entry.sha256 for entry in entries.values() if entry.place is not None)
    for item, entry in entries.items():
        data = Finished(run, item, entry).picture.read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256, item
    for path in (run / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            keys = [name.partition(".")[0] for name in tar.getnames()][::3]
        table = pyarrow.parquet.read_table(path.with_suffix(".parquet"))
        assert table["key"].to_pylist() == keys == [f"{int(path.stem):05d}{n:04d}" for n in range(len(keys))]


class Process:
    """What one process does to a run: it begins, writes pictures, and ends or is killed."""

    def __init__(self, path: Path, output: Output, damaged: dict[str, str] | None = None) -> None:
        make = RunDirectory.resume if (path / "records.jsonl").exists() else RunDirectory.create
        self.dir = make(path)
        self.ledger = Ledger.load(self.dir.records_path).open(self.dir.dir_fd)
        self.outcomes: list[Outcome] = []
        self.writer = Writer(self.dir, self.ledger, output, self.outcomes.append)
        self.writer.begin(damaged or {})

    def draw(self, seeds: range, **fields: Any) -> None:
        """One item for each seed; pictures are noise of that seed."""
        for seed in seeds:
            self.writer.submit([request(seed, **fields)], ReadyImages(noise_pictures(seed=seed)))
        self.writer.flush()

    def leave(self) -> None:
        """As if killed: nothing is finished."""
        self.writer.close()
        self.ledger.close()
        self.dir.close()


@contextlib.contextmanager
def process(path: Path, output: Output, *, complete: bool = True, **options: Any) -> Iterator[Process]:
    """A process that ends as it should."""
    run = Process(path, output, **options)
    try:
        yield run
        run.writer.settle(complete=complete)
    finally:
        run.leave()


def shards(**options: Any) -> Shards:
    return Shards(**{"min_free_gb": 0.0, "fsync": Fsync.never, "shard_pictures": 3, "writer_threads": 1, **options})


def names(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "shards").iterdir())


def item(seed: int) -> str:
    return f"items/0000_a/seed_{seed}"
