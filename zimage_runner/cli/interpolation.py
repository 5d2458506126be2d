"""OmegaConf's ``${...}`` in texts that come from files of a run or from a picture: kept as text, never looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_HARMLESS = re.compile(r"\$\{(?:conf_file:[\w./-]+|[\w.\[\]]+)\}")
"""Another field of the same config, and a file that comes with the package."""
_OPENED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
"""``${`` that no backslash makes plain text."""


def looks_up(text: str) -> bool:
    """Whether OmegaConf would ask a resolver for a part of the text, such as ``${oc.env:HOME}``."""
    return _OPENED.search(_HARMLESS.sub("-", text)) is not None


def literal(value: Any) -> Any:
    """The value written so that OmegaConf reads back exactly it: ``${`` in texts, at any depth, becomes plain text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: literal(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [literal(entry) for entry in value]
    return value


def lookups(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and text of each entry of a plain container that ``looks_up``."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from lookups(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from lookups(entry, name)
    elif isinstance(value, str) and looks_up(value):
        yield name, value
