"""JSON that every reader accepts, whatever a user's prompt or metadata contains."""

from __future__ import annotations

import enum
import json
import math
from pathlib import PurePath
from typing import Any


def compact_json(value: Any) -> str:
    """One line of pure ASCII: safe in a JSON-lines file and in a Latin-1 PNG chunk."""
    return _dumps(value, ensure_ascii=True, separators=(",", ":"))


def readable_json(value: Any) -> bytes:
    """Indented UTF-8 for people; falls back to escapes for text that is not valid Unicode (lone surrogates)."""
    try:
        return (_dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (_dumps(value, ensure_ascii=True, indent=2) + "\n").encode("ascii")


def _dumps(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain, **options)
    except ValueError:  # NaN or Inf, which JSON does not have
        return json.dumps(_finite(value), allow_nan=False, default=_plain, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
