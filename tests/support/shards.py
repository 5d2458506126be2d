"""What is in the shards of a run, read by other readers than ours, and compared with its ledger."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pyarrow.parquet

from zimage_runner.outputs.finished import Finished
from zimage_runner.outputs.ledger import RECORDS, Ledger


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
