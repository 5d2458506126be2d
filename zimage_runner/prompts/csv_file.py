"""Comma- or tab-separated tables with a header line."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.base import INPUT, Prompt
from zimage_runner.prompts.rows import RowReader, TableSource
from zimage_runner.prompts.text import MAX_LINE_BYTES, file_lines, input_path, shown

DELIMITERS = (",", ";", "|", "\t")
"""Usual ones."""


@dataclass(kw_only=True, slots=True)
class Csv(TableSource):
    """``prompts=csv prompts.path=FILE``: the first line names the columns; empty cells mean "not set"."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv", ".tab")

    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The file; relative to where the program is started."""
    delimiter: str | None = field(default=None, metadata=FREE_TEXT)
    """One character; null is a tab for .tsv and .tab files, else a comma."""
    quotes: bool | None = None
    """Whether "..." encloses a cell. null: yes, but not between tabs, where quotation marks are usually text."""

    def read(self) -> Iterator[Prompt]:
        file = input_path(self.path, "csv")
        lines, told = _separator_line(file_lines(file), shown(file))
        delimiter = self.delimiter or told or ("\t" if file.suffix.lower() in (".tsv", ".tab") else ",")
        if len(delimiter) != 1 or delimiter in '\r\n"':
            raise UserError(f"prompts.delimiter={delimiter!r} is not one character, such as ',' or ';'")
        reader = RowReader(self, file.parent)
        rows = _rows(lines, shown(file), delimiter, quotes=delimiter != "\t" if self.quotes is None else self.quotes)
        where, names = next(rows, (shown(file), []))
        if not names:
            raise UserError(f"{where} holds no header: the first line names the columns")
        _check_names(names, where)
        _check_delimiter(names, where, delimiter)
        reader.check_header(tuple(names), where)
        for where, cells in rows:
            yield reader.prompt(_row(names, cells, where), where)


def _separator_line(lines: Iterator[tuple[int, str]], name: str) -> tuple[Iterator[tuple[int, str]], str | None]:
    """The lines without Excel's ``sep=;`` before the header, and the character that it names."""
    first = next(lines, None)
    if first is None:  # cannot be: an empty file was refused
        raise UserError(f"{name} is empty: put at least one prompt in it")
    match = re.fullmatch(r'"?sep=(\t|[^\w\s"])"?[,;\t]*', first[1], re.IGNORECASE)
    return (lines, match[1]) if match else (itertools.chain([first], lines), None)


def _rows(
    lines: Iterator[tuple[int, str]], name: str, delimiter: str, *, quotes: bool
) -> Iterator[tuple[str, list[str]]]:
    """``file:line`` of each row's first line, and its cells; blank lines are skipped."""
    csv.field_size_limit(MAX_LINE_BYTES)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    last = 0

    def numbered() -> Iterator[str]:
        nonlocal last
        for number, line in lines:
            last = number
            yield line + "\n"

    reader = csv.reader(numbered(), delimiter=delimiter, strict=True, quoting=quoting)
    while True:
        before = last
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{name}:{before + 1}: {_broken(error)}") from None
        if cells:
            yield f"{name}:{before + 1}", cells


def _broken(error: csv.Error) -> str:
    if "unexpected end of data" in str(error) or "field limit" in str(error):
        return (
            'broken CSV: a quotation mark is opened in this row and not closed: close it, write "" for one within a '
            "cell, or set prompts.quotes=false if they are text"
        )
    return f"broken CSV: {error}"


def _check_names(names: list[str], where: str) -> None:
    for name in names:
        if not name.strip():
            raise UserError(f"{where}: column {names.index(name) + 1} has no name: the first line names the columns")
        if names.count(name) > 1:
            raise UserError(f"{where}: two columns are called {name!r}: rename one")


def _check_delimiter(names: list[str], where: str, delimiter: str) -> None:
    """One column whose name holds what usually separates columns: spreadsheets of half of Europe write semicolons."""
    other = next((character for character in DELIMITERS if character != delimiter and character in names[0]), None)
    if len(names) == 1 and other is not None:
        remedy = "give the file a name that ends in .tsv" if other == "\t" else f"set prompts.delimiter='\"{other}\"'"
        raise UserError(f"{where}: one column, {names[0]!r}: its cells seem to be separated by {other!r}; {remedy}")


def _row(names: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        raise UserError(
            f"{where}: {len(cells)} cells, but the header names {len(names)} columns: "
            'put text that holds the delimiter in "quotes"'
        )
    return {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)}
