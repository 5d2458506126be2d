"""Lines of ledgers and prompts.jsonl as rows of the index. They are files that anybody may have written."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from zimage_runner.outputs.ledger import IMAGE
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import place_in

OK, FAILED = 0, 1
"""A picture's status."""
_ITEM = re.compile(r"items/([0-9]{5,9})_[^/\\]+/seed_([0-9]{1,19})")
_IMAGE = re.compile(r"[A-Za-z0-9_-]+\.(png|jpg|jpeg|webp)")


def objects(lines: bytes) -> list[Any]:
    """JSON of each line, None for a damaged one. Read as one array, which takes half the time."""
    parts = lines.split(b"\n")
    parts = [part for part in parts if part]
    try:
        found = from_json(b"[%s]" % b",".join(parts))
    except ValueError:
        found = []
    return found if len(found) == len(parts) else [_object(part) for part in parts]


def _object(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return None


def ledger_row(run: int, record: Any) -> tuple[Any, ...] | None:
    """A ledger line as a row of ``pictures``; None for one that is damaged."""
    try:
        place = place_of(record["item"])
        ok = record["status"] == "ok"
        if place is None:
            return None
        image = record.get("image", IMAGE)
        image = None if image == IMAGE or not _IMAGE.fullmatch(image) else image
        error = None if ok else plain(str(record.get("error", "")))
        number, seconds = record.get("bytes"), record.get("seconds")
        return (
            (run << 32) + place[0], place[1], record["item"], OK if ok else FAILED, image,
            number if type(number) is int and 0 <= number < 1 << 62 else None,
            float(seconds) if isinstance(seconds, int | float) else None, _milliseconds(record.get("written")), error,
            *_in_shard(record if ok else {}),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _in_shard(record: dict[str, Any]) -> tuple[Any, ...]:
    """Shard, offset, and offset and bytes of the record; None for files. Raises ValueError, KeyError."""
    place = place_in(record)
    return (None, None, None, None) if place is None else (place.shard.rpartition("/")[2], *place[1:])


def place_of(item: str) -> tuple[int, int] | None:
    """Prompt number and seed of an item directory; None for a name that no plan makes."""
    match = _ITEM.fullmatch(item)
    if match is None or (seed := int(match[2])) >= 1 << 63 or not item.isprintable():
        return None
    return int(match[1]), seed


def _milliseconds(written: Any) -> int | None:
    try:
        return round(datetime.fromisoformat(written).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        return None


def prompt_row(row: Any) -> tuple[int, str, str | None, int | None, dict[str, Any]] | None:
    """Index, text, id, number of own seeds and own parameters of a line of prompts.jsonl; None if it is damaged."""
    try:
        index, text, name, seeds = row.pop("index"), row.pop("text"), row.pop("id", None), row.pop("seeds", None)
        for key in ("metadata", "source"):
            row.pop(key, None)
        if type(index) is not int or not 0 <= index < 10**9 or type(text) is not str:
            return None
        params = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
        return index, plain(text), None if name is None else plain(str(name)), seeds and len(seeds), params
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def folded(text: str) -> str | None:
    """What the search looks in; None where it is the text itself."""
    folded = plain(text.casefold())
    return None if folded == text else folded


def plain(text: str) -> str:
    """Without lone surrogates, which neither SQLite nor HTTP can carry."""
    return text if _is_text(text) else text.encode("utf-8", "replace").decode()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
