"""A run's shards as its ledger has them: what a dead writer left behind is cut off, what is full is finished.

Every sample that the ledger names stays. What it does not name was written by a process that ended before it could say
so, or is an earlier attempt of a picture that was drawn again.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.config import Fsync, Layout, Output, Shards
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.place import PARQUET, SHARDS, TAR
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.shard_finish import Kept, finish_tar, index_name, is_closed, remove, rewrite
from zimage_runner.outputs.shard_tar import OpenTar, end_of, start_of
from zimage_runner.outputs.uploads import Uploads

log = logging.getLogger(__name__)

NOTHING: Mapping[str, str] = MappingProxyType({})

_NUMBER = re.compile(r"(?:train-)?([0-9]{5,9})\.(?:tar|parquet)(?:\.tmp)?")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A tar file to which samples can be added, and what is in it."""

    number: int
    samples: list[Kept]
    is_finished: bool
    """Whether it has its end mark and table."""

    def open(self, dir_fd: int) -> OpenTar:
        """To be continued. Its table goes first: it would not name what is added. Raises OSError."""
        with atomic.directory(SHARDS, dir_fd) as folder:
            atomic.remove(folder, index_name(self.number).rpartition("/")[2])
        return OpenTar.reopen(dir_fd, self.number, len(self.samples), end_of(self.samples[-1].place))


def names_of(dir_fd: int) -> list[str]:
    """File names in the folder of shards. Raises OSError."""
    with atomic.directory(SHARDS, dir_fd) as folder:
        return sorted(os.listdir(folder))


def next_number(dir_fd: int) -> int:
    """A number that no shard of the run has or had: an old line of the ledger must not lead into a new file."""
    numbers = [int(match[1]) for name in names_of(dir_fd) if (match := _NUMBER.fullmatch(name))]
    return 1 + max([*numbers, *Uploads.load(dir_fd).numbers()], default=-1)


class Stage(enum.Enum):
    """When shards are settled."""

    begins = enum.auto()
    """Pictures are going to be added: the last shard with room is left to be continued."""
    pauses = enum.auto()
    """No more pictures by this process, and some are missing."""
    complete = enum.auto()
    """All pictures are there."""


def settle(
    run_dir: RunDirectory, ledger: Ledger, output: Output, stage: Stage, damaged: Mapping[str, str] = NOTHING
) -> Unfinished | None:
    """Bring the files into line with the ledger, which must be open. Return the tar file that is to be continued.

    damaged: items whose pictures are no longer what was written, and why; they are given up. Raises OSError,
    RunStopped.
    """
    give_up(ledger, damaged)
    by_shard: dict[str, list[Kept]] = {}
    for item, entry in ledger.entries.items():
        if entry.place is not None:
            by_shard.setdefault(entry.place.shard, []).append(Kept(item, entry))
    return _Settling(run_dir, ledger, output, by_shard).run(stage)


def give_up(ledger: Ledger, damaged: Mapping[str, str]) -> None:
    """Note that these pictures are lost: their places may be taken by others before they are drawn again."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    lost = [
        {"item": item, "status": "failed", "fingerprint": entry.fingerprint, "error": f"lost: {reason}", "written": now}
        for item, reason in damaged.items()
        if (entry := ledger.entries.get(item)) is not None and entry.place is not None
    ]
    ledger.append_all(lost, sync=True)


class _Settling:
    def __init__(self, run_dir: RunDirectory, ledger: Ledger, output: Output, by_shard: dict[str, list[Kept]]) -> None:
        self._fd, self._ledger = run_dir.dir_fd, ledger
        self._layout = output.layout if isinstance(output, Shards) else Layout.webdataset
        self._output = output
        self._sync = output.fsync is Fsync.item
        self._by_shard = by_shard
        self._uploads = Uploads.load(run_dir.dir_fd)

    def run(self, stage: Stage) -> Unfinished | None:
        names = names_of(self._fd)
        with atomic.directory(SHARDS, self._fd) as folder:
            for name in names:
                if name.endswith(atomic.TMP_SUFFIX) and _NUMBER.fullmatch(name):
                    atomic.remove(folder, name)
        tars: list[Unfinished] = []
        for name in names:
            shard = f"{SHARDS}/{name}"
            samples = sorted(self._by_shard.get(shard, ()), key=lambda kept: kept.place.offset)
            if TAR.fullmatch(shard) is not None:
                tars += self._tar(shard, samples)
            elif PARQUET.fullmatch(shard) is not None:
                self._parquet(shard, samples)
        last = self._to_continue(tars, stage)
        for tar in tars:
            if tar is not last and not tar.is_finished:
                self._finish(tar)
        return last

    def _to_continue(self, tars: list[Unfinished], stage: Stage) -> Unfinished | None:
        is_parquet = self._layout is Layout.parquet
        if stage is Stage.complete or (stage is Stage.pauses and not is_parquet):
            return None
        with_room = [tar for tar in tars if _room(tar, self._output) and not (is_parquet and tar.is_finished)]
        return with_room[-1] if with_room else None

    def _tar(self, shard: str, samples: list[Kept]) -> Iterator[Unfinished]:
        """Cut it back, or write it anew without what does not count. Yield it where pictures may be added."""
        match = TAR.fullmatch(shard)
        assert match is not None
        number = int(match[1])
        if not samples:
            self._remove(shard)
            return
        ends = [0, *(end_of(kept.place) for kept in samples)]
        if any(end != start_of(kept.place) for end, kept in zip(ends, samples)):
            log.info("%s is written anew without pictures that were given up", shard)
            self._anew(samples)
            return
        with os.fdopen(beneath.open_file(self._fd, shard), "rb") as file:
            size = os.fstat(file.fileno()).st_size
        is_finished = is_closed(size, ends[-1]) and self._exists(index_name(number))
        if not is_finished and size != ends[-1]:
            log.info("%s is cut back to the %d samples that count", shard, len(samples))
            OpenTar.reopen(self._fd, number, len(samples), ends[-1]).close()
        if shard not in self._uploads:
            yield Unfinished(number, samples, is_finished)

    def _exists(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(os.stat(name, dir_fd=self._fd, follow_symlinks=False))
        return False

    def _parquet(self, shard: str, samples: list[Kept]) -> None:
        import pyarrow.parquet

        if not samples:
            self._remove(shard)
            return
        with os.fdopen(beneath.open_file(self._fd, shard), "rb") as file:
            rows = pyarrow.parquet.ParquetFile(file).metadata.num_rows
        if rows != len(samples):
            log.info("%s is written anew: it holds pictures that were given up", shard)
            self._anew(samples)

    def _finish(self, one: Unfinished) -> None:
        if self._layout is Layout.parquet:
            rewrite(self._fd, self._ledger, one.number, one.samples, as_parquet=True)
        else:
            finish_tar(self._fd, one.number, one.samples, sync=self._sync)

    def _anew(self, samples: list[Kept]) -> None:
        number, old = next_number(self._fd), samples[0].place.shard
        parquet = self._layout is Layout.parquet
        rewrite(self._fd, self._ledger, number, samples, as_parquet=parquet)
        self._uploads.forget(old)
        if not parquet:
            entries = self._ledger.entries
            finish_tar(self._fd, number, [Kept(kept.item, entries[kept.item]) for kept in samples], sync=True)

    def _remove(self, shard: str) -> None:
        remove(self._fd, shard)
        self._uploads.forget(shard)


def _room(one: Unfinished, output: Output) -> bool:
    bounds = output if isinstance(output, Shards) else Shards()
    end = end_of(one.samples[-1].place)
    return len(one.samples) < bounds.shard_pictures and end < bounds.shard_mb * 1e6
