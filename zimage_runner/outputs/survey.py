"""What of a plan is done: the ledger's word, checked against the files."""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError, counted
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside, NotPlain, Statuses, open_file
from zimage_runner.outputs.ledger import Entry, Ledger
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import RECORD, Piece, Place, record_at
from zimage_runner.plan import WorkItem

_BLOCK = 1 << 20


class Retry(enum.Enum):
    """Which items ``resume`` draws."""

    unfinished = "unfinished"
    """Missing ones and failed ones."""
    failed = "failed"
    """Failed ones alone."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """State of each item of a plan, by its directory."""

    done: set[str] = field(default_factory=set)
    """Pictures that are there."""
    failed: set[str] = field(default_factory=set)
    """Items that were tried in vain."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Pictures that the ledger has but the disk has not, or not as written: the reason."""
    skipped: set[str] = field(default_factory=set)
    """Missing and damaged items that ``retry=failed`` leaves alone."""
    lost: int = 0
    """How many of ``skipped`` are damaged."""

    todo: list[WorkItem] = field(default_factory=list)
    """Items that this process shall draw, in the plan's order."""

    def is_settled(self, item: WorkItem) -> bool:
        """True for what this process shall not draw."""
        name = item.item_dir
        return name in self.done or name in self.skipped

    def __str__(self) -> str:
        parts = [counted(len(self.done), "picture is done", "pictures are done")]
        if never := len(self.skipped) - self.lost:
            left = counted(never, "was never drawn and is", "were never drawn and are")
            parts.append(f"{left} not asked for (retry=failed)")
        if self.lost:
            parts.append(f"{counted(self.lost, 'is', 'are')} damaged and not asked for (retry=failed)")
        if self.failed:
            parts.append(f"{len(self.failed):,} failed before")
        if self.damaged:
            name, reason = next(iter(self.damaged.items()))
            again = counted(len(self.damaged), "is", "are")
            parts.append(f"{again} damaged and drawn again ({name}: {reason})")
        return ", ".join(parts)


def survey(
    directory: Path, ledger: Ledger, items: Iterable[WorkItem], *, verify: bool = False, retry: Retry = Retry.unfinished
) -> Progress:
    """Compare ledger and files. Every picture's size is looked at; with ``verify`` its bytes are read too."""
    progress = Progress()
    if not ledger.entries:
        directory = Path(os.curdir)  # nothing of it is looked at, and a dry run's may not be there
    with atomic.directory(directory) as dir_fd:
        pictures = Pictures(dir_fd)
        for item in items:  # a million of them: nothing here twice
            name = item.item_dir
            entry = ledger.entries.get(name)
            if entry is not None and not entry.ok:
                progress.failed.add(name)
            elif entry is not None and (reason := pictures.damage(name, entry, verify)) is not None:
                if retry is Retry.failed:
                    progress.skipped.add(name)
                    progress.lost += 1
                    continue
                progress.damaged[name] = reason
            elif entry is not None:
                progress.done.add(name)
                continue
            elif retry is Retry.failed:
                progress.skipped.add(name)
                continue
            progress.todo.append(item)
    return progress


class Pictures:
    """The finished pictures below an open run directory, compared with its ledger."""

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        self._status = Statuses(dir_fd)
        self._shards: dict[str, int] = {}
        """Bytes of each shard that was looked at."""

    def damage(self, item_dir: str, entry: Entry, verify: bool) -> str | None:
        """Why the file is not the picture that was written; None if it is. A link is none, wherever it leads.

        ``verify`` reads the picture's bytes and its record.
        """
        path = f"{item_dir}/{entry.image}"
        try:
            if entry.place is not None:
                return self._damage_in_shard(item_dir, entry, entry.place, verify)
            size = self._status(path).st_size
            if size != entry.size:
                return f"{size:,} bytes instead of {entry.size:,}"
            if verify and _sha256(open_file(self._dir_fd, path)) != entry.sha256:
                return "its bytes changed"
            if verify:
                return self._damage_of_record(item_dir, entry)
        except FileNotFoundError:
            return "deleted"
        except NotPlain as error:
            return f"{error.name} is {error.kind}"
        except OSError as error:  # no other item's affair
            return f"it cannot be read: {error.strerror}"
        return None

    def _damage_in_shard(self, item_dir: str, entry: Entry, place: Place, verify: bool) -> str | None:
        """As ``damage``, for a picture of a shard. Raises NotPlain, OSError."""
        if place.shard not in self._shards:
            self._shards[place.shard] = self._shard_size(place.shard)
        size = self._shards[place.shard]
        if place.record_offset + place.record_bytes > size or place.offset + entry.size > size:
            return f"{place.shard} was cut off"
        if not verify:
            return None
        if hashlib.sha256(self._piece(place.shard, place.offset, entry.size)).hexdigest() != entry.sha256:
            return "its bytes changed"
        return self._damage_of_record(item_dir, entry)

    def _shard_size(self, shard: str) -> int:
        """Bytes of a shard, here or where it was uploaded to."""
        try:
            return self._status(shard).st_size
        except FileNotFoundError:
            from zimage_runner.outputs.uploads import Uploads

            if (uploaded := Uploads.load(self._dir_fd).entries.get(shard)) is None:
                raise
            return uploaded["bytes"]

    def _piece(self, shard: str, offset: int, size: int) -> bytes:
        # The descriptor's own path: the directory may have been moved.
        return Piece(Path(f"/proc/self/fd/{self._dir_fd}"), shard, offset, size, shard).read_bytes()

    def _damage_of_record(self, item_dir: str, entry: Entry) -> str | None:
        """Why the item's record.json is not the one of this picture; None if it is. Raises NotPlain, OSError."""
        try:
            if (place := entry.place) is not None:
                record = from_json(self._piece(place.shard, place.record_offset, place.record_bytes))
            else:
                with os.fdopen(open_file(self._dir_fd, f"{item_dir}/{RECORD}"), "rb") as file:
                    record = from_json(file.read())
            if (record["sha256"], record["fingerprint"]) == (entry.sha256, entry.fingerprint):
                return None
        except FileNotFoundError:
            return f"its {RECORD} was deleted"
        except (ValueError, KeyError, TypeError):
            pass
        return f"its {RECORD} changed"


def _sha256(fd: int) -> str:
    """Hex digest of an open file, which is closed."""
    total = hashlib.sha256()
    with os.fdopen(fd, "rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def check_same_pictures(
    directory: Path,
    ledger: Ledger,
    items: Iterable[WorkItem],
    fingerprint: Callable[[WorkItem], str],
    numerics: dict[str, Any],
) -> None:
    """Refuse to add to a run whose finished pictures were made in another way (other weights, device, dtype ...)."""
    for item in items:
        entry = ledger.entries.get(item.item_dir)
        if entry is None or not entry.ok or entry.fingerprint == fingerprint(item):
            continue
        changes = _changes(record_at(directory, item.item_dir, entry.place), item, numerics)
        raise UserError(
            f"resume={directory}: {item.item_dir} was drawn in another way, so the run would hold mixed pictures"
            f"{': ' + '; '.join(changes) if changes else ''}: resume it where it began, or start a new run"
        )


def _changes(file: Inside, item: WorkItem, numerics: dict[str, Any]) -> list[str]:
    """What differs between a picture's record and now, as far as the record can be read."""
    try:
        record = from_json(file.read_bytes())
        loras = [(lora["name"], lora["weight"], lora["digest"]) for lora in record.get("loras", [])]
        was = {"prompt": record["prompt"], **record["params"], "loras": _shown(loras), **record["numerics"]}
        was |= _shown_inputs(record.get("inputs") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    loras = [(lora.name, lora.weight, lora.digest) for lora in item.params.loras]
    now = {"prompt": item.prompt.text, **item.params.to_dict(), "loras": _shown(loras), **numerics}
    now |= _shown_inputs(item.params.inputs.record() if item.params.inputs else {})
    changes = [
        f"{k} was {was.get(k)}, now {now.get(k)}" for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)
    ]
    return changes or ["the weights differ"]


def _shown_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Files by their digest: where one lies does not matter."""
    return {
        name: f"sha256 {str(value.get('digest'))[:8]}" if isinstance(value, dict) else value
        for name, value in inputs.items()
    }


def _shown(loras: Iterable[tuple[str, float, str]]) -> str:
    return ", ".join(f"{name}:{weight:g} (sha256 {digest[:8]})" for name, weight, digest in loras) or "none"
