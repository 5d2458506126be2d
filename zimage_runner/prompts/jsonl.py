"""One JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.base import INPUT, Prompt
from zimage_runner.prompts.rows import RowReader, TableSource
from zimage_runner.prompts.text import bare, file_lines, input_path, shown

MAX_OBJECT_BYTES = 64 * 2**20
"""Of a line. A run's own prompts.jsonl may have a million seeds in one."""


@dataclass(kw_only=True, slots=True)
class Jsonl(TableSource):
    """``prompts=jsonl prompts.path=FILE``: lines such as {"text": "a cat", "id": "c1", "width": 768, "seeds": [1]}."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")

    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The file; relative to where the program is started."""

    def read(self) -> Iterator[Prompt]:
        file = input_path(self.path, "jsonl")
        yield from prompts_of_json_lines(file_lines(file, limit=MAX_OBJECT_BYTES), shown(file), self, file.parent)


def prompts_of_json_lines(
    lines: Iterable[tuple[int, str]], name: str, source: TableSource, folder: Path | None = None
) -> Iterator[Prompt]:
    """Prompts of numbered lines; blank lines are skipped. ``folder``: where names of picture files start."""
    reader = RowReader(source, folder)
    first = True
    for number, line in lines:
        if bare(line):
            where = f"{name}:{number}"
            if first:
                _check_layout(line.strip(), where)
            first = False
            yield reader.prompt(parse_object(line, where), where)


def _check_layout(line: str, where: str) -> None:
    """Ordinary JSON files are no JSON lines."""
    if line.startswith("["):
        what, command = "a JSON array, where each line has to be an object", "jq -c '.[]'"
    elif line == "{":
        what, command = "an object over several lines, where each line has to be one", "jq -c ."
    else:
        return
    raise UserError(f"{where}: {what}: {command} FILE.json > FILE.jsonl makes it so")


def parse_object(line: str, where: str) -> dict[str, Any]:
    """One line of JSON as an object; UserError says what is wrong and at which column."""
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: broken JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: not an object: write {{"text": "a cat"}}')
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{max(keys, key=keys.count)!r} is given twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
