"""Prompts piped into the program."""

from __future__ import annotations

import enum
import functools
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.jsonl import prompts_of_json_lines
from zimage_runner.prompts.rows import TableSource
from zimage_runner.prompts.text import read_lines
from zimage_runner.prompts.text_file import prompts_of_lines


class LineFormat(enum.Enum):
    """What a line of standard input is."""

    text = "text"
    jsonl = "jsonl"


@dataclass(kw_only=True, slots=True)
class Stdin(TableSource):
    """``cat prompts.txt | zimage-runner prompts=stdin``; jobs of a multirun all see the same lines."""

    format: LineFormat = LineFormat.text
    flags: bool = True
    """As in prompts=text_file."""

    def where(self) -> str:
        return "standard input"

    def read(self) -> Iterator[Prompt]:
        lines = read_lines(io.BytesIO(_stdin_bytes()), "stdin")
        if self.format is LineFormat.jsonl:
            yield from prompts_of_json_lines(lines, "stdin", self)
        else:
            yield from prompts_of_lines(lines, "stdin", flags=self.flags)


@functools.cache
def _stdin_bytes() -> bytes:
    """All of standard input, read once a process."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("prompts=stdin reads prompts from a pipe: write cat prompts.txt | ... prompts=stdin")
    return sys.stdin.buffer.read()
