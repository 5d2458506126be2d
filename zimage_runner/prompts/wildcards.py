"""Files that ``__name__`` stands for: text files with a value a line, and the lists within YAML and JSON files.

Read here and not by the dynamicprompts library, which drops what YAML takes for a number or a truth value, follows
links in circles, and keeps byte order marks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zimage_runner.errors import UserError
from zimage_runner.outputs.parsed import is_too_deep
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.text import bare, open_input, read_lines, shown

FIELD = "prompts.template.wildcards"
MAX_VALUES = 250_000
"""Of one file; YAML's aliases make astronomically many of a few lines."""
MAX_DEPTH = 64


class Value(NamedTuple):
    """An entry of a list, and how often a random draw takes it."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ValueList:
    """The values of one name: of a text file, read when first asked, or of a list in YAML or JSON."""

    file: Path
    listed: tuple[Value, ...] | None = None

    def values(self) -> list[Value]:
        """The values in their order, as they are written. Raises UserError."""
        if self.listed is not None:
            return list(self.listed)
        with open_input(self.file, FIELD) as stream:
            lines = [bare(line) for _, line in read_lines(stream, shown(self.file))]
        return [Value(line) for line in lines if line and not line.startswith("#")]


def find_lists(directory: Path) -> dict[str, ValueList]:
    """Every list of a folder and those below it by its name: ``deep/colour`` for deep/colour.txt.

    The keys of a YAML or JSON file are names in its folder. A file that cannot be read is left out, with a warning.
    """
    found: dict[str, ValueList] = {}

    def add(name: str, values: ValueList) -> None:
        if name in found:
            first, last = shown(found[name].file.name), shown(values.file.name)
            warn_once(
                "wildcards twice",
                f"{shown(values.file)}: {first} has values of __{name}__, too: those of {last} are taken",
            )
        found[name] = values

    for file in _files(directory):
        folder = file.parent.relative_to(directory).as_posix()
        prefix = "" if folder == "." else f"{folder}/"
        if file.suffix == ".txt":
            add(f"{prefix}{file.stem}", ValueList(file))
            continue
        try:
            for name, values in _structured(file):
                add(f"{prefix}{name}", ValueList(file, tuple(values)))
        except UserError as error:
            warn_once(f"wildcards {file}", f"{error} (the file is left out)")
    return found


def _files(directory: Path) -> Iterator[Path]:
    """Text, YAML and JSON files; hidden folders are skipped, linked ones followed once."""
    seen: set[str] = set()
    for folder, below, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(folder, n) for n in sorted(names) if Path(n).suffix in (".txt", ".yaml", ".yml", ".json"))


def _structured(file: Path) -> list[tuple[str, list[Value]]]:
    with open_input(file, FIELD) as stream:
        text = "\n".join(line for _, line in read_lines(stream, shown(file)))
    data = _parsed(file, text)
    budget = _Budget(file)
    if isinstance(data, list):
        return [(file.stem, _entries(data, budget))]
    return list(_named(data, (), budget)) if isinstance(data, dict) else []


def _parsed(file: Path, text: str) -> Any:
    """The file's data, in which every scalar is the text that was written."""
    import yaml

    try:
        if file.suffix == ".json":
            return json.loads(text, parse_int=str, parse_float=str)
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # makes texts, lists and mappings alone
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # a loader itself recurses, in C until it crashes
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            _check_depth(file, depth)
        return yaml.load(text, Loader=loader)
    except json.JSONDecodeError as error:
        raise UserError(f"{shown(file)}:{error.lineno}: not readable as JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        if is_too_deep(error):
            raise _too_deep(file) from None
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{shown(file)}:{line}: not readable as YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{shown(file)}: not readable: {str(error).splitlines()[0]}") from None


def _check_depth(file: Path, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep(file)


def _too_deep(file: Path) -> UserError:
    return UserError(f"{shown(file)}: nested more than {MAX_DEPTH} deep: put lists nearer to the top")


class _Budget:
    """Counts what a file unfolds to."""

    def __init__(self, file: Path) -> None:
        self._file, self._left = file, MAX_VALUES

    def spend(self, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{shown(self._file)}: more than {MAX_VALUES:,} values: write out less than its aliases do")
        _check_depth(self._file, depth)


def _named(data: dict[Any, Any], above: tuple[str, ...], budget: _Budget) -> Iterator[tuple[str, list[Value]]]:
    for key, value in data.items():
        budget.spend(len(above))
        names = (*above, str(key))
        if isinstance(value, dict):
            yield from _named(value, names, budget)
        else:
            yield "/".join(names), _entries(value if isinstance(value, list) else [value], budget)


def _entries(data: list[Any], budget: _Budget) -> list[Value]:
    values = []
    for item in data:
        budget.spend(0)
        weight: Any = 1
        if isinstance(item, dict):  # {text: red, weight: 2}
            item, weight = item.get("text") or item.get("content"), item.get("weight", 1)
        elif isinstance(item, str) and item[:1].isdigit() and "::" in item:  # 2::red
            number, _, rest = item.rpartition("::")
            item, weight = (rest, number) if _is_weight(number) else (item, 1)
        elif isinstance(item, bool):  # JSON's
            item = json.dumps(item)
        if isinstance(item, str) and (text := bare(item)):
            values.append(Value(text, float(weight) if _is_weight(weight) else 1.0))
    return values


def _is_weight(value: Any) -> bool:
    try:
        return 0 < float(value) < 1e9
    except (TypeError, ValueError):
        return False
