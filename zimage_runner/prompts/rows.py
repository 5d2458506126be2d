"""Rows of a table (JSONL, CSV, Parquet ...) become prompts: which column is what, and of which type."""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import NOTHING, Prompt, PromptSource
from zimage_runner.prompts.seeds import parse_seed_list
from zimage_runner.prompts.text import check_characters, check_text
from zimage_runner.sampling import SamplingParams

SAMPLING_KINDS: dict[str, str] = {f.name: str(f.type) for f in fields(SamplingParams)}
"""Each sampling field's type by name: int, float or str."""
OF_SNAPSHOTS = ("index", "source")
"""Written by snapshot.py."""
PROMPT_FIELDS = ("text", "id", "seeds", *SAMPLING_KINDS, "metadata", *OF_SNAPSHOTS)
ALIASES = {"prompt": "text", "seed": "seeds"}
TEXT_NAMES = ("text", "texts", "prompt", "prompts", "caption", "captions", "description", "sentence")
"""Usual names, in small letters, of the column that holds the prompts."""


@dataclass(kw_only=True, slots=True)
class TableSource(PromptSource):
    """A source whose rows have named columns."""

    columns: dict[str, str] = field(default_factory=dict)
    """Field to column, where the names differ: {text: caption, id: image_id}. Fields: text, id, seeds, metadata and
    every sampling field."""
    metadata: list[str] = field(default_factory=list)
    """Columns carried into the record as they are; ["*"] carries every column that is not a field."""


class RowReader:
    """Turns rows into prompts for one source; remembers which column is which for each set of columns."""

    def __init__(self, source: TableSource) -> None:
        for name in source.columns:
            if name not in PROMPT_FIELDS:
                raise UserError(f"prompts.columns.{name} is not a prompt field{_suggest(name, PROMPT_FIELDS)}")
        self._field_of = {column: name for name, column in source.columns.items()}
        self._mapped = dict(source.columns)
        self._metadata = set(source.metadata)
        self._known: dict[tuple[str, ...], list[tuple[str, str | None]]] = {}

    def check_header(self, names: tuple[str, ...], where: str) -> None:
        """For tables with one header: every mapped or carried column must be there."""
        wanted = {f"prompts.columns.{name}={column}": column for name, column in self._mapped.items()}
        wanted |= {f"prompts.metadata: {column}": column for column in self._metadata - {"*"}}
        for what, column in wanted.items():
            if column not in names:
                raise UserError(f"{where}: {what}: no such column; the columns are {', '.join(names) or 'none'}")
        self._roles(names, where)

    def prompt(self, row: Mapping[str, Any], where: str) -> Prompt:
        """The row as a prompt. Null and (from CSV) empty cells mean "not set"."""
        values: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for column, name in self._roles(tuple(row), where):
            value = row[column]
            if name is None:
                metadata[column] = json_safe(value)
            elif value is not None:
                values[name] = value
        return _prompt(values, metadata, where, self._mapped)

    def _roles(self, names: tuple[str, ...], where: str) -> list[tuple[str, str | None]]:
        """(column, field) of each column; field None is metadata."""
        if names not in self._known:
            if not self._known:
                self._check_text_column(names, where)
            roles = [(column, self._role(column, names, where)) for column in names]
            taken = [name for _, name in roles if name]
            for name in taken:
                if taken.count(name) > 1:
                    columns = " and ".join(c for c, n in roles if n == name)
                    raise UserError(f"{where}: columns {columns} both give {name}: keep one, or map prompts.columns")
            self._known[names] = roles
        return self._known[names]

    def _check_text_column(self, names: tuple[str, ...], where: str) -> None:
        if "text" in self._mapped or any(ALIASES.get(name, name) == "text" for name in names):
            return
        likely = [name for name in names if name.lower() in TEXT_NAMES]
        name = likely[0] if likely else "COLUMN"
        name = name if re.fullmatch(r"\w+", name, re.ASCII) else f"'{name}'"
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(
            f"{where}: no column is called text or prompt; there {'is' if len(names) == 1 else 'are'} "
            f"{shown or 'none'}: name the one that holds the prompts, prompts.columns.text={name}"
        )

    def _role(self, column: str, names: tuple[str, ...], where: str) -> str | None:
        if column in self._field_of:
            return self._field_of[column]
        if column in self._metadata:
            return None
        name = ALIASES.get(column, column)
        # A column named like a field that is mapped to another column is not that field any more.
        if name in PROMPT_FIELDS and name not in self._mapped:
            return name
        if "*" in self._metadata:
            return None
        raise UserError(
            f"{where}: unknown column {column!r}{_suggest(column, (*PROMPT_FIELDS, *ALIASES))}; map it with "
            f"prompts.columns, or carry it into the records with prompts.metadata='[{column}]' (or '[\"*\"]')"
        )


def _prompt(values: dict[str, Any], metadata: dict[str, Any], where: str, mapped: Mapping[str, str]) -> Prompt:
    if "text" not in values:
        raise UserError(f"{where}: no text: give the prompt in column {mapped.get('text', 'text')!r}")
    text, name = values.pop("text"), values.pop("id", None)
    if not isinstance(text, str):
        raise UserError(f'{where}: text={text!r} is not a string: write "..."')
    seeds = values.pop("seeds", None)
    index, source = values.pop("index", None), values.pop("source", where)
    carried = values.pop("metadata", None)
    if carried is not None:
        metadata = _metadata(carried, where) | metadata
    return Prompt(
        text=check_text(text, where),
        source=source if isinstance(source, str) and source else where,
        id=None if name is None else check_id(name, where),
        index=None if index is None else _check_index(index, where),
        overrides={f: convert(f, v, where) for f, v in values.items()} or NOTHING,
        seeds=None if seeds is None else parse_seed_list(seeds, f"{where}: seeds"),
        metadata=metadata or NOTHING,
    )


def check_id(value: object, where: str) -> str:
    """An id is a short string; integers are taken as their digits."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: id={value!r} is neither a string nor an integer")
    text = str(value).strip()
    if not text or len(text) > 256:
        raise UserError(f"{where}: id={text[:40]!r} has {len(text)} characters: use 1 to 256")
    check_characters(text, f"{where}: id")
    return text


def _check_index(value: object, where: str) -> int:
    number = _number(value)
    if number is None or number != int(number) or not 0 <= number < 10**9:
        raise UserError(f"{where}: index={value!r} is not an integer from 0 to 999999999")
    return int(number)


def convert(name: str, value: object, where: str) -> int | float | str:
    """A cell as the sampling field's type; numbers may come as text ("512"), integers as 512.0."""
    kind = SAMPLING_KINDS[name]
    if kind == "str":
        if not isinstance(value, str):
            raise UserError(f"{where}: {name}={value!r} is not a string")
        check_characters(value, f"{where}: {name}")
        return value.strip()
    number = _number(value)
    if number is None or (kind == "int" and number != int(number)):
        raise UserError(f"{where}: {name}={value!r} is not {'an integer' if kind == 'int' else 'a number'}")
    return int(number) if kind == "int" else float(number)


def _number(value: object) -> float | int | None:
    """A finite number, or None."""
    if isinstance(value, str):
        try:
            value = float(value) if len(value) < 40 else None
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _metadata(value: object, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f'{where}: metadata is not a JSON object: write {{"key": "value"}}') from None
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: metadata={value!r} is not an object: write {{"key": "value"}}')
    return {str(k): json_safe(v) for k, v in value.items()}


def json_safe(value: Any) -> Any:
    """The value as JSON can hold it: dates as ISO text, NaN as null, anything unknown as its text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _suggest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    fields = [field for field in PROMPT_FIELDS if field not in OF_SNAPSHOTS]
    return f" (did you mean {close[0]!r}?)" if close else f"; the fields are {', '.join(fields)}"
