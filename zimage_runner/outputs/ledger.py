"""records.jsonl: what is done, one JSON line for each finished or failed item, appended and never rewritten.

The last line of an item wins. A process killed in the middle of a line leaves a torn tail, which the next one cuts off.
Each line ends with a checksum of what stands before it, so that a byte that changed costs that line's item and nothing
else. Lines of earlier versions, which have none, are taken as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside, open_file
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import Place, place_in

RECORDS, IMAGE = "records.jsonl", "image.png"
"""The ledger of a run directory, and an item's picture in a folder of its own."""


class Entry(NamedTuple):
    """What the ledger remembers of one item."""

    ok: bool
    """Whether its picture is on disk; False means that it failed."""
    sha256: str
    """Hex digest of the picture's file; empty when failed."""
    size: int
    """Bytes of the picture's file; 0 when failed."""
    fingerprint: str
    """What the picture depends on; another fingerprint means another picture."""
    image: str = IMAGE
    """File name of the picture in the item's folder."""
    place: Place | None = None
    """Where it is in a shard; None for a file in the item's folder."""


class Ledger:
    """The state of a run, item directory -> Entry, and the open file that it is appended to.

    ``append`` may be called from any thread.
    """

    def __init__(self, path: str | os.PathLike[str], entries: dict[str, Entry], damaged: int = 0) -> None:
        self.path = Path(path)
        self.entries = entries
        self.damaged = damaged
        """Lines that could not be read (a torn tail is not counted); their items count as not done."""
        self._fd = -1
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ledger without changing it; a missing file is an empty ledger. Raises UserError."""
        entries: dict[str, Entry] = {}
        damaged = 0
        try:
            with contextlib.suppress(FileNotFoundError), _file(Path(path)).open(buffering=1 << 20) as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # torn: its item is not done
                    try:
                        item, entry = parse_line(line)
                        entries[item] = entry
                    except (ValueError, KeyError, TypeError):
                        damaged += line != b"\n"
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        return cls(path, entries, damaged)

    def open(self, dir_fd: int | None = None, *, sync: bool = False) -> Self:
        """Open for appending, cutting off a torn last line; with ``sync``, its name is safe. Raises DiskError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            if dir_fd is not None:
                self._fd = open_file(dir_fd, self.path.name, flags)
            else:
                with atomic.directory(self.path.parent) as folder:
                    self._fd = open_file(folder, self.path.name, flags)
            _cut_torn_tail(self._fd)
            if sync and dir_fd is not None:
                os.fsync(dir_fd)
        except OSError as error:
            raise atomic.disk_error(error, str(self.path)) from error
        return self

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Add one line: item, status (ok or failed), sha256, bytes, fingerprint and whatever else. Raises DiskError."""
        self.append_all([record], sync=sync)

    def append_all(self, records: Sequence[dict[str, Any]], *, sync: bool = False) -> None:
        """Add lines at once, as ``append`` does one. Raises DiskError."""
        lines = [with_checksum(compact_json(record).encode()) for record in records]
        parsed = [parse_line(line) for line in lines]
        if not lines:
            return
        with self._lock:
            try:
                self._append(b"".join(lines))
                if sync:
                    os.fsync(self._fd)
            except OSError as error:
                raise atomic.disk_error(error, str(self.path)) from error
            self.entries.update(parsed)

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._fd)
        if before.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the ledger was deleted")
        try:
            atomic.write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, before.st_size)  # a full disk takes part of a line
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def record_head(item_dir: str, status: str, index: int, seed: int, fingerprint: str, **result: Any) -> dict[str, Any]:
    """Return the first fields of an item's record and of its line in the ledger, in the order that ``load`` is fast at.

    result: image (file name), sha256 and bytes of a picture that is there, its place in a shard, and whatever else; or
    error.
    """
    head = {"item": item_dir, "status": status, "index": index, "seed": seed, "fingerprint": fingerprint}
    return {**head, **result}


def _file(path: Path) -> Inside:
    return Inside(path.parent, path.name)


_IMAGE = re.compile(r"image\.[a-z0-9]{2,5}")
# The head of a finished item's line as the writer puts it: three times faster than parsing a million whole lines.
_FAST = re.compile(
    rb'\{"item":"([ !#-\[\]-~]+)","status":"ok","index":\d+,"seed":\d+,"fingerprint":"([0-9A-Za-z_-]*)",'
    rb'"image":"(image\.[a-z0-9]{2,5})","sha256":"([0-9a-f]{64})","bytes":(\d+)'
    rb'(?:,"shard":"(shards/(?:\d{5,9}\.tar|train-\d{5,9}\.parquet))","key":"\d+",'
    rb'"offset":(\d{1,18}),"record_offset":(\d{1,18}),"record_bytes":(\d{1,18})|(?!,"shard"))[,}].*\}\n'
)


_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\n')
_CHECKSUM_BYTES = len(b',"crc32":"01234567"}\n')


def with_checksum(record: bytes) -> bytes:
    """A record (a JSON object, not empty) as a line of the ledger: with CRC-32 of all before it as its last field."""
    head = record[:-1]
    return b'%b,"crc32":"%08x"}\n' % (head, zlib.crc32(head))


def _is_checked(line: bytes) -> bool:
    """Whether a line has its checksum; without one it is of an earlier version. Raises ValueError if it was altered."""
    head = len(line) - _CHECKSUM_BYTES
    found = _CHECKSUM.match(line, head) if head > 0 else None
    if found is not None and int(found[1], 16) == zlib.crc32(memoryview(line)[:head]):
        return True
    if found is not None or b'"crc32"' in line:
        raise ValueError("a byte has changed")
    return False


def records(lines: bytes) -> list[dict[str, Any]]:
    """The records of whole lines of a ledger, for whoever wants more of them than an Entry has.

    A line that ``Ledger.load`` would not take is left out. Parsed as one array, which takes half the time.
    """
    parts = [part for part in lines.split(b"\n") if part and not _is_altered(part + b"\n")]
    try:
        if not all(part.startswith(b"{") and part.endswith(b"}") for part in parts):
            raise ValueError("a line is no object")
        found = from_json(b"[%b]" % b",".join(parts))
        if len(found) != len(parts):
            raise ValueError("lines belong together")
    except ValueError:
        found = [value for part in parts if (value := _object(part)) is not None]
    return [value for value in found if _is_record(value)]


def _is_altered(line: bytes) -> bool:
    try:
        _is_checked(line)
    except ValueError:
        return True
    return False


def _object(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return None


def _is_record(value: Any) -> bool:
    try:
        _entry(value)
    except (ValueError, KeyError, TypeError):
        return False
    return True


def parse_line(line: bytes) -> tuple[str, Entry]:
    """Item and entry of a whole line. Raises ValueError, KeyError, TypeError for one that cannot be read."""
    if _is_checked(line) and (match := _FAST.fullmatch(line)):
        item, fingerprint, image, sha256, size, shard, *numbers = match.groups()
        place = None if shard is None else Place(sys.intern(shard.decode()), *map(int, numbers))
        image = sys.intern(image.decode())
        return item.decode(), Entry(True, sha256.decode(), int(size), fingerprint.decode(), image, place)
    return _entry(from_json(line))


def _entry(record: Any) -> tuple[str, Entry]:
    """Item and entry of a record. Raises ValueError, KeyError or TypeError for what is none."""
    ok = record["status"] == "ok"
    sha256, size = (record["sha256"], record["bytes"]) if ok else ("", 0)
    item, fingerprint = record["item"], record["fingerprint"]
    if not (type(item) is type(sha256) is type(fingerprint) is str and type(size) is int):
        raise TypeError("a field has the wrong type")
    return item, Entry(ok, sha256, size, fingerprint, image_of(record), place_in(record) if ok else None)


def image_of(record: dict[str, Any]) -> str:
    """Return the picture's file name of a line of a ledger. Raises ValueError for a name that no run gives."""
    image = record.get("image", IMAGE)
    if not (isinstance(image, str) and _IMAGE.fullmatch(image)):
        raise ValueError("the picture's file name is none of ours")
    return sys.intern(image)


def _cut_torn_tail(fd: int) -> None:
    """Shorten the file to the end of its last whole line."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 65_536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)
