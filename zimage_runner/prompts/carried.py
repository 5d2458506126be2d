"""Metadata that a prompt carries into its records and pictures: what JSON can hold, and no more than can be read again.

It is written into every picture of the prompt, so binary cells (pictures of a data set, most often) are left out, and
size and depth have bounds.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.notes import warn_once

MAX_METADATA_BYTES = 65_536
"""As JSON, for each prompt."""
MAX_SNAPSHOT_BYTES = 2**20
"""The same for rows of another run's prompts.jsonl, where template and filled-in values have come on top."""
MAX_DEPTH = 32


class _Binary:
    """Stands for a value to be left out."""


_BINARY = _Binary()


def carry(values: Mapping[str, Any], where: str, limit: int = MAX_METADATA_BYTES) -> dict[str, Any]:
    """``values`` as JSON can hold them: dates as ISO text, NaN as null, binary ones left out, the unknown as its text.

    Raises UserError for what is nested too deeply or too large.
    """
    if not values:
        return {}
    carried = {_text(str(name)): _plain(value, f"{where}: metadata {name}", 1) for name, value in values.items()}
    if binary := [name for name, value in carried.items() if value is _BINARY]:
        warn_binary(binary, where)
        carried = {name: value for name, value in carried.items() if value is not _BINARY}
    size = len(json.dumps(carried))
    if size > limit:
        largest = max(carried, key=lambda name: len(json.dumps(carried[name])))
        raise UserError(
            f"{where}: the metadata has {size:,} bytes, most of them in {largest}: at most {limit:,} are written into "
            "every record and picture: name the columns to carry, prompts.metadata=[...]"
        )
    return carried


def warn_binary(names: Sequence[str], where: str) -> None:
    """Warn once in a run that these columns or keys are left out."""
    if names:
        warn_once("binary", f"{where}: {', '.join(names)}: binary data is left out of the records")


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return _BINARY
    if isinstance(value, Mapping | list | tuple):
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} deep: carry other columns, prompts.metadata=[...]")
        return _nested(value, where, depth + 1)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return _text(str(value))


def _nested(value: Any, where: str, depth: int) -> Any:
    """A mapping or list; one that held nothing but binary data is left out whole."""
    if isinstance(value, Mapping):
        pairs = {_text(str(name)): _plain(inner, where, depth) for name, inner in value.items()}
        kept: Any = {name: inner for name, inner in pairs.items() if inner is not _BINARY}
    else:
        pairs = [_plain(inner, where, depth) for inner in value]
        kept = [inner for inner in pairs if inner is not _BINARY]
    if len(kept) == len(pairs):
        return kept
    if not kept:
        return _BINARY
    warn_once("binary", f"{where}: binary data within it is left out of the records")
    return kept


def _text(value: str) -> str:
    """Without halves of surrogate pairs, which no file can hold."""
    return value.encode(errors="replace").decode()
