"""What fields and options there are, for messages: looked up in the registered schemas, imported when first asked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.base import INPUT
from zimage_runner.prompts.vocabulary import CONFIG_NAMES, LETTERS, NAMES, TOP_NAMES

ALIASES = {name: field for field, names in NAMES.items() for name in names} | LETTERS | CONFIG_NAMES
"""What other tools call the fields of groups."""
_TEXT_KINDS = {"str": "text", "str | None": "text", "list[str]": "list", "dict[str, str]": "dict"}


def known_fields(parent: str) -> list[str]:
    """Field names of the node at ``parent``: of every option that can stand there."""
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import RunConfig

    if not parent:
        return [f.name for f in dataclasses.fields(RunConfig)] + ["experiment"]
    options = SCHEMAS.get(parent, {}).values()
    return sorted({name for option in options for name in field_names(option)})


def field_names(option: type) -> list[str]:
    return [f.name for f in dataclasses.fields(option)]


def kind_of(key: str) -> str:
    """The type of a field as its dataclass has it, such as ``int | None``; ``Any`` for what is not known."""
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import RunConfig

    group, _, name = key.rpartition(".")
    options = SCHEMAS.get(group, {}).values() if group else [RunConfig]
    kinds = [str(field.type) for option in options for field in dataclasses.fields(option) if field.name == name]
    return kinds[0] if kinds else "Any"


@functools.cache
def texts() -> dict[str, str]:
    """Each field that holds text, by its dotted name: ``text``, ``list`` (of texts) or ``dict`` (with texts as values).

    A field counts if it is a text in one of its group's options.
    """
    kinds = ((name, _TEXT_KINDS.get(str(field.type))) for name, field in _all_fields())
    return {name: kind for name, kind in kinds if kind is not None}


@functools.cache
def free_texts() -> frozenset[str]:
    """Dotted names of the fields that hold free text, by their metadata FREE_TEXT."""
    return frozenset(name for name, field in _all_fields() if FREE_TEXT.items() <= field.metadata.items())


@functools.cache
def prompt_inputs() -> tuple[str, ...]:
    """Names of the fields of ``prompts`` that say what is drawn, in any of its options."""
    from zimage_runner.config.registry import SCHEMAS

    found = (field for option in SCHEMAS["prompts"].values() for field in dataclasses.fields(option))
    return tuple({field.name: None for field in found if INPUT.items() <= field.metadata.items()})


def _all_fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every field of every option with its dotted name; one that several options have comes several times."""
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import RunConfig

    waiting: list[tuple[str, type]] = [("", RunConfig)]
    waiting += [(f"{group}.", option) for group, options in SCHEMAS.items() for option in options.values()]
    for prefix, schema in waiting:
        for field in dataclasses.fields(schema):
            yield f"{prefix}{field.name}", field
            if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
                waiting.append((f"{prefix}{field.name}.", field.default_factory))


def closest(name: str, parent: str) -> str | None:
    """The field of ``parent`` that ``name`` was probably meant to be."""
    known = known_fields(parent)
    meant = (ALIASES if parent else TOP_NAMES).get(name)
    if meant in known:
        return meant
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def options_with(group: str, field: str) -> list[str]:
    """The options of a config group that have this field."""
    from zimage_runner.config.registry import SCHEMAS

    options = SCHEMAS.get(group, {})
    return [f"{group}={name}" for name, option in options.items() if field in field_names(option)]


def groups_with(field: str) -> list[str]:
    """The fields of this name within groups: ``width`` is ``sampling.width``; what others call steps is found too."""
    from zimage_runner.config.registry import SCHEMAS

    field = ALIASES.get(field, field)
    groups = (group for group, options in SCHEMAS.items() if any(field in field_names(o) for o in options.values()))
    return [f"{group}.{field}" for group in groups]


def option_of(group: str, type_name: str | None) -> str:
    """The option that stands in a config group, by the name of its dataclass."""
    from zimage_runner.config.paths import CONFIG_DIR
    from zimage_runner.config.registry import SCHEMAS

    options = SCHEMAS.get(group, {}).items()
    named = [name for name, option in options if option.__name__ == type_name]
    names = [name for name in named if (CONFIG_DIR / group / f"{name}.yaml").is_file()]  # several may share a schema
    return f"{group}={names[0]}" if names else f"the {group} chosen"


def field_of_type(type_name: str) -> str | None:
    """The one field or group, at any depth, whose value is of this dataclass or its abstract class."""
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import RunConfig

    for group, options in SCHEMAS.items():
        if any(type_name in (parent.__name__ for parent in option.__mro__) for option in options.values()):
            return group
    nested = [(None, RunConfig), *((group, option) for group, all_ in SCHEMAS.items() for option in all_.values())]
    for group, option in nested:
        for name, hint in typing.get_type_hints(option).items():
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if any(getattr(kind, "__name__", None) == type_name for kind in kinds):
                return name if group is None else f"{group}.{name}"
    return None


def reader_of(suffix: str) -> str | None:
    """Return the option of ``prompts`` that reads files of this suffix, such as ``.csv``."""
    from zimage_runner.config.registry import SCHEMAS

    return next(
        (name for name, source in SCHEMAS["prompts"].items() if suffix in getattr(source, "suffixes", ())), None
    )
