"""One prompt a line, with the flags that users of other tools know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.base import INPUT, NOTHING, Prompt, RowSource
from zimage_runner.prompts.flags import ALMOST, parse_flags
from zimage_runner.prompts.text import MARK, bare, check_text, file_lines, input_path, shown

TABLES = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""Which option of ``prompts`` reads files of this name."""


@dataclass(kw_only=True, slots=True)
class TextFile(RowSource):
    """``prompts=text_file prompts.path=FILE``: UTF-8; blank lines and lines starting with # are skipped."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The file; relative to where the program is started."""
    flags: bool = True
    """Read ``--w --h --s --d --n --g`` at the end of a line; false keeps every line as it is."""

    def read(self) -> Iterator[Prompt]:
        file = input_path(self.path, "text_file")
        if option := TABLES.get(file.suffix.lower()):
            raise UserError(
                f"prompts.path={self.path} is a table, and prompts=text_file takes every line as a prompt: "
                f"use prompts={option} (or give the file a name that ends in .txt)"
            )
        yield from prompts_of_lines(file_lines(file), shown(file), flags=self.flags, folder=file.parent)


def prompts_of_lines(
    lines: Iterable[tuple[int, str]], name: str, *, flags: bool, folder: Path | None = None
) -> Iterator[Prompt]:
    """Prompts of numbered lines. A prompt that starts with # is written with a backslash before it.

    ``folder``: where names of picture files start; None is where the program was started.
    """
    for number, line in lines:
        line = bare(line)
        if not line or line.startswith("#"):
            continue
        where = f"{name}:{number}"
        if MARK in line:
            raise UserError(
                f"{where}: a byte order mark (U+FEFF) is at position {line.index(MARK) + 1}, where two files seem to "
                "be joined without a line end: put one there, or remove the mark"
            )
        text = line[1:] if line.startswith("\\#") else line
        if not flags or not ("--" in text or ALMOST.search(text)):
            yield Prompt(text=check_text(text, where), source=where)
            continue
        parsed = parse_flags(text, where, folder)
        yield Prompt(
            text=check_text(parsed.text, where),
            source=where,
            overrides=parsed.overrides or NOTHING,
            loras=parsed.loras,
            lora_weights=parsed.lora_weights,
            seeds=parsed.seeds,
        )
