"""JSON and YAML that anybody may have written: plain values or ValueError, never another error, a crash or a flood."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100
"""Levels of YAML. Its parser recurses, in C until the process dies."""
MOST_ALIASES = 1000
CONSTRUCTORS_RAISE = (RecursionError, TypeError, AttributeError, OverflowError, LookupError)
"""What PyYAML lets through, besides ValueError, for ``!!bool 3`` or a date that is none."""


def from_json(data: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def from_yaml(data: str | bytes) -> Any:
    """The value of a YAML text: of plain types, and not much larger than the text. Raises ValueError."""
    import yaml

    try:
        check_yaml(data)
        return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except CONSTRUCTORS_RAISE as error:
        raise ValueError(f"it cannot be read: {error}") from None


def check_yaml(data: str | bytes) -> None:
    """Raise ValueError for YAML that nests too deep or unfolds to far more than was written, YAMLError for none."""
    import yaml

    try:
        _check_events(data)
    except yaml.YAMLError as error:
        if is_too_deep(error):
            raise _too_deep() from None
        raise


def is_too_deep(error: Exception) -> bool:
    """Whether this is what libyaml, from 0.2.6 on, says of a text that nests more than 1,000 deep, wherever it is."""
    return "maximum nesting depth" in str(error)


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} deep: put what it holds nearer to the top")


def _check_events(data: str | bytes) -> None:
    import yaml

    anchored: list[bool] = []  # for each open collection, whether it or one around it has a name
    aliases = 0
    for event in yaml.parse(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None or (bool(anchored) and anchored[-1]))
            if len(anchored) > DEEPEST:
                raise _too_deep()
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MOST_ALIASES or (anchored and anchored[-1]):
                raise ValueError("its aliases unfold to too much: write out what they stand for")


def mapping(value: Any) -> dict[str, Any]:
    """A value that should be a mapping; an empty one instead of anything else."""
    return value if isinstance(value, dict) else {}
