"""What the jobs of a multirun were started with, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def unquoted(override: str) -> str:
    """The value of a ``field=value`` text without its quotes, as near as one gets without Hydra's grammar."""
    return override.partition("=")[2].strip("\"'")


def overrides_by_field(overrides: Iterable[str], value_of: Callable[[str], str] = unquoted) -> dict[str, str]:
    """field -> value of ``field=value`` texts; ``value_of`` reads the value of one."""
    return {text.lstrip("+").partition("=")[0]: value_of(text) for text in overrides}


def varying_fields(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Fields that are not the same in all jobs, in the order of the command line. A job is its fields' values."""
    swept = [fields for fields in jobs if fields]
    # A job that was resumed also names the config groups that it had, and what it was resumed from.
    fresh = [fields for fields in swept if "resume" not in fields] or swept
    names = dict.fromkeys(name for fields in fresh for name in fields)
    return [name for name in names if len({_text(fields.get(name)) for fields in swept}) > 1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def inert(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula, as it does what begins with these; numbers are none."""
    text = text.replace("\r", " ")
    if text.startswith(("=", "+", "-", "@", "\t")):
        try:
            float(text)
        except ValueError:
            return f"'{text}"
    return text
