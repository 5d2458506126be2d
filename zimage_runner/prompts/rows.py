"""Rows of a table (JSONL, CSV, Parquet ...) become prompts: which column is what, and of which type."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from zimage_runner.errors import UserError, one_line
from zimage_runner.prompts.base import NOTHING, Prompt, RowSource
from zimage_runner.prompts.carried import MAX_METADATA_BYTES, MAX_SNAPSHOT_BYTES, carry
from zimage_runner.prompts.loras import parse_loras, parse_weights
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.picture_values import finite, picture_value, short
from zimage_runner.prompts.seeds import parse_seed_list
from zimage_runner.prompts.text import check_characters, check_text
from zimage_runner.prompts.vocabulary import FIELD_OF, OPPOSITES, PLAIN_NAMES, guidance_of_cfg, is_cfg, meant
from zimage_runner.sampling import PICTURE_FIELDS, PICTURE_FILES, SAMPLING_FIELDS, SamplingParams

SAMPLING_KINDS: dict[str, str] = {f.name: str(f.type) for f in fields(SamplingParams) if f.name in SAMPLING_FIELDS}
"""Each sampling field's type by name: int, float or str."""
OF_SNAPSHOTS = ("index", "source")
"""Written by snapshot.py."""
PROMPT_FIELDS = (
    "text",
    "id",
    "seeds",
    *SAMPLING_KINDS,
    *PICTURE_FIELDS,
    "loras",
    "lora_weights",
    "metadata",
    *OF_SNAPSHOTS,
)
TEXT_NAMES = ("text", "texts", "prompt", "prompts", "caption", "captions", "description", "sentence")
"""Usual names, in small letters, of the column that holds the prompts."""


@dataclass(kw_only=True, slots=True)
class TableSource(RowSource):
    """A source whose rows have named columns."""

    columns: dict[str, str] = field(default_factory=dict)
    """Field to column, where the names differ: {text: caption, id: image_id}. Fields: text, id, seeds, loras,
    lora_weights, metadata and every sampling field, image, mask and strength among them."""
    metadata: list[str] = field(default_factory=list)
    """Columns carried into the record as they are; ["*"] carries every column that is not a field."""


class Role(NamedTuple):
    """What a column is."""

    column: str
    field: str | None
    """None is metadata."""
    cfg: bool = False
    """Other tools' CFG scale, for guidance_scale."""


class RowReader:
    """Turns rows into prompts for one source; remembers which column is which for each set of columns."""

    def __init__(self, source: TableSource, folder: Path | None = None) -> None:
        """``folder``: where names of picture files start; None is where the program was started."""
        self._folder = folder or Path()
        self._mapped: dict[str, str] = {}
        self._cfg: set[str] = set()
        self._reversed: dict[str, str] = {}
        for word, column in source.columns.items():
            name = FIELD_OF.get(word, word)
            if name not in PROMPT_FIELDS:
                raise UserError(f"prompts.columns.{word}{_no_field(word, column)}")
            if name in self._mapped:
                raise UserError(f"prompts.columns gives {name} twice: keep one")
            if column in self._mapped.values():
                raise UserError(f"prompts.columns names the column {column!r} twice: give it to one field")
            self._mapped[name] = column
            self._cfg |= {column} if is_cfg(word) else set()
            if column in (*PROMPT_FIELDS, *FIELD_OF):
                self._reversed[column] = f" (the field stands first: prompts.columns='{{{column}: {word}}}')"
        self._field_of = {column: name for name, column in self._mapped.items()}
        self._metadata = set(source.metadata)
        self._known: dict[tuple[str, ...], list[Role]] = {}

    def check_header(self, names: tuple[str, ...], where: str) -> None:
        """For tables with one header: every mapped or carried column must be there."""
        wanted = {f"prompts.columns.{name}={column}": column for name, column in self._mapped.items()}
        wanted |= {f"prompts.metadata: {column}": column for column in self._metadata - {"*"}}
        for what, column in wanted.items():
            if column not in names:
                hint = self._reversed.get(column, "")
                raise UserError(f"{where}: {what}: no such column; the columns are {', '.join(names) or 'none'}{hint}")
        self._roles(names, where)

    def prompt(self, row: Mapping[str, Any], where: str) -> Prompt:
        """The row as a prompt. Null and (from CSV) empty cells mean "not set"."""
        values: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        cfg = False
        for role in self._roles(tuple(row), where):
            value = row[role.column]
            if role.field is None or self._holds_pictures(role, value):
                metadata[role.column] = value
            elif not is_unset(role.field, value):
                values[role.field] = value
                cfg |= role.cfg
        pictures = {name: values.pop(name) for name in PICTURE_FIELDS if name in values}
        pictures = {name: picture_value(name, value, where, self._folder) for name, value in pictures.items()}
        return _prompt(values, metadata, where, self._mapped, cfg, pictures)

    def _holds_pictures(self, role: Role, value: object) -> bool:
        """Whether a cell is a data set's picture itself, where all columns are carried and nobody mapped this one."""
        carried = "*" in self._metadata and role.column not in self._field_of
        return carried and role.field in PICTURE_FILES and not isinstance(value, str | None)

    def _roles(self, names: tuple[str, ...], where: str) -> list[Role]:
        if names not in self._known:
            if not self._known:
                self._check_text_column(names, where)
            roles = [self._role(column, names, where) for column in names]
            taken = [role.field for role in roles if role.field]
            for name in taken:
                if taken.count(name) > 1:
                    columns = " and ".join(role.column for role in roles if role.field == name)
                    raise UserError(f"{where}: columns {columns} both give {name}: keep one, or map prompts.columns")
            _tell_synonyms(roles, self._field_of, where)
            self._known[names] = roles
        return self._known[names]

    def _check_text_column(self, names: tuple[str, ...], where: str) -> None:
        if "text" in self._mapped or any(FIELD_OF.get(name, name) == "text" for name in names):
            return
        likely = [name for name in names if name.lower() in TEXT_NAMES]
        name = likely[0] if likely else "COLUMN"
        name = name if re.fullmatch(r"\w+", name, re.ASCII) else f"'{name}'"
        shown = one_line(", ".join(names[:10]) + (", ..." if len(names) > 10 else ""))
        raise UserError(
            f"{where}: no column is called text or prompt; there {'is' if len(names) == 1 else 'are'} "
            f"{shown or 'none'}: name the one that holds the prompts, prompts.columns.text={name}"
        )

    def _role(self, column: str, names: tuple[str, ...], where: str) -> Role:
        if column in self._field_of:
            return Role(column, self._field_of[column], column in self._cfg)
        if column in self._metadata:
            return Role(column, None)
        carries_rest = "*" in self._metadata
        name = FIELD_OF.get(column, column)
        # A column named like a field that is mapped to another column is not that field any more.
        # Where the rest is carried, a column of the field's own name goes before its synonyms.
        goes_behind = carries_rest and name != column and column not in ("prompt", "seed") and name in names
        # file_name and the like of a data set are no pictures to start from unless somebody says so.
        goes_behind |= carries_rest and name != column and name in PICTURE_FIELDS
        if name in PROMPT_FIELDS and name not in self._mapped and not goes_behind:
            return Role(column, name, is_cfg(column))
        if carries_rest:
            return Role(column, None)
        raise UserError(
            f"{where}: unknown column {column!r}{_suggest(column)}; map it with "
            f"prompts.columns, or carry it into the records with prompts.metadata='[{column}]' (or '[\"*\"]')"
        )


def _tell_synonyms(roles: list[Role], mapped: Mapping[str, str], where: str) -> None:
    """Say which columns are read by other tools' names; those that are mapped were chosen by the user."""
    known = {*PLAIN_NAMES, *mapped}
    found = [r for r in roles if r.field and r.column != r.field and r.column not in known and not r.cfg]
    if found:
        warn_once("columns", f"{where}: column " + ", ".join(f"{r.column} is read as {r.field}" for r in found))
    if cfg := next((r.column for r in roles if r.cfg), None):
        warn_once(
            "cfg", f"{where}: {cfg} is other tools' CFG scale, where 1 is no guidance: guidance_scale = {cfg} - 1"
        )


def _prompt(
    values: dict[str, Any],
    metadata: dict[str, Any],
    where: str,
    mapped: Mapping[str, str],
    cfg: bool,
    pictures: dict[str, Any],
) -> Prompt:
    if "text" not in values:
        raise UserError(f"{where}: no text: give the prompt in column {mapped.get('text', 'text')!r}")
    text, name = values.pop("text"), values.pop("id", None)
    if not isinstance(text, str):
        raise UserError(f'{where}: text={short(text)} is not a string: write "..."')
    seeds = values.pop("seeds", None)
    loras, weights = values.pop("loras", None), values.pop("lora_weights", None)
    index, source = values.pop("index", None), values.pop("source", where)
    carried = values.pop("metadata", None)
    if carried is not None:
        metadata = {**_metadata(carried, where), **metadata}
    return Prompt(
        text=check_text(text, where),
        source=source if isinstance(source, str) and source else where,
        id=None if name is None else check_id(name, where),
        index=None if index is None else _check_index(index, where),
        overrides={f: convert(f, v, where, cfg=cfg and f == "guidance_scale") for f, v in values.items()} | pictures
        or NOTHING,
        loras=() if loras is None else parse_loras(loras, f"{where}: loras"),
        lora_weights=() if weights is None else parse_weights(weights, f"{where}: lora_weights"),
        seeds=None if seeds is None else seeds_of(seeds, f"{where}: seeds"),
        metadata=carry(metadata, where, MAX_METADATA_BYTES if index is None else MAX_SNAPSHOT_BYTES) or NOTHING,
    )


def check_id(value: object, where: str) -> str:
    """An id is a short string; integers are taken as their digits."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: id={short(value)} is neither a string nor an integer")
    text = str(value).strip()
    if not text or len(text) > 256:
        raise UserError(f"{where}: id={text[:40]!r} has {len(text)} characters: use 1 to 256")
    check_characters(text, f"{where}: id")
    return text


def _check_index(value: object, where: str) -> int:
    number = finite(value)
    if number is None or number != int(number) or not 0 <= number < 10**9:
        raise UserError(f"{where}: index={short(value)} is not an integer from 0 to 999999999")
    return int(number)


def convert(name: str, value: object, where: str, *, cfg: bool = False) -> int | float | str:
    """A cell as the sampling field's type; numbers may come as text ("512"), integers as 512.0.

    ``cfg`` says that it is other tools' CFG scale, which becomes ``guidance_scale``.
    """
    kind = SAMPLING_KINDS[name]
    if kind == "str":
        if not isinstance(value, str):
            raise UserError(f"{where}: {name}={short(value)} is not a string")
        check_characters(value, f"{where}: {name}")
        return value.strip()
    number = finite(value)
    if number is None or (kind == "int" and number != int(number)):
        raise UserError(f"{where}: {name}={short(value)} is not {'an integer' if kind == 'int' else 'a number'}")
    if abs(number) >= 2**53:  # beyond, arithmetic and messages would go astray
        raise UserError(f"{where}: {name}={short(value)} is out of range")
    if kind == "int":
        return int(number)
    return guidance_of_cfg(float(number)) if cfg and number >= 0 else float(number)


def seeds_of(value: object, where: str) -> tuple[int, ...]:
    """A cell as seeds. Whole numbers may come as 42.0, which is how pandas writes a column with gaps."""
    return parse_seed_list(_whole(value, where), where)


def _whole(value: object, where: str) -> object:
    if isinstance(value, list | tuple):
        return [_whole(entry, where) for entry in value]
    if isinstance(value, float) and value.is_integer():
        if abs(value) > 2**53:
            raise UserError(f"{where}: {value!r} has lost its last digits on the way: store seeds as integers or text")
        return int(value)
    if isinstance(value, str):
        return re.sub(r"(?<![\d.])(\d+)\.0*(?![\d.])", r"\1", value)
    return value


def is_unset(name: str, value: object) -> bool:
    """Null, and where a number is needed what Python and pandas write for a gap: NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    blank = name in ("seeds", "loras", "lora_weights", *PICTURE_FIELDS) or SAMPLING_KINDS.get(name) in ("int", "float")
    return blank and isinstance(value, str) and value.strip().lower() in ("", "nan", "<na>")


def _metadata(value: object, where: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f'{where}: metadata is not a JSON object: write {{"key": "value"}}') from None
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: metadata={short(value)} is not an object: write {{"key": "value"}}')
    return value


def _no_field(word: str, column: str) -> str:
    """Why ``prompts.columns.word=column`` says nothing, and what it should be."""
    if column in (*PROMPT_FIELDS, "prompt", "seed"):
        return f"={column} is the wrong way round: write prompts.columns='{{{column}: {word}}}', the field first"
    return f" is not a prompt field{_suggest(word)}"


def _suggest(name: str) -> str:
    if name.lower() in OPPOSITES:
        return " (how much stays: 'strength' is 1 minus it)"
    field = meant(name) or next(iter(difflib.get_close_matches(name.lower(), (*PROMPT_FIELDS, *FIELD_OF), n=1)), None)
    fields = [field for field in PROMPT_FIELDS if field not in OF_SNAPSHOTS]
    return f" (did you mean {field!r}?)" if field else f"; the fields are {', '.join(fields)}"
