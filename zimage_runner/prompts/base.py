"""What every source of prompts must do."""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar

from zimage_runner.prompts.prompt import NOTHING, Prompt
from zimage_runner.prompts.template import Template

__all__ = ["INPUT", "NOTHING", "Prompt", "PromptSource", "RowSource", "Wins"]

INPUT = {"input": True}
"""Metadata of a source's fields that say what is drawn: the texts themselves, or where they are."""


@dataclass(kw_only=True, slots=True)
class PromptSource(abc.ABC):
    """An option of the ``prompts`` group. The fields here pick from what the source yields, in this order."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of the files that it reads, for messages."""

    template: Template = field(default_factory=Template)
    """Blanks and variants in the prompts; what they make is what the fields below count."""
    offset: int = 0
    """Skip this many prompts first."""
    limit: int | None = None
    """Then take at most this many."""
    sample: int | None = None
    """Then draw this many of those at random, kept in their order."""
    sample_seed: int = 0
    """Decides which ones ``sample`` draws."""
    shard: str | None = None
    """Then keep every n-th: "1/4" to "4/4" split the prompts over four runs."""

    def where(self) -> str:
        """Return where the prompts are, for messages: a path, a pattern, the list, standard input."""
        values = [getattr(self, field.name) for field in fields(self) if INPUT.items() <= field.metadata.items()]
        return next((value for value in values if isinstance(value, str)), "the list")

    @abc.abstractmethod
    def read(self) -> Iterator[Prompt]:
        """Yield the prompts in order. Raises UserError with field or file:line on bad input."""


class Wins(enum.Enum):
    """Whose word holds where a row and the command line both set a field."""

    row = "row"
    command_line = "command_line"


@dataclass(kw_only=True, slots=True)
class RowSource(PromptSource):
    """A source whose prompts may bring sampling fields and seeds of their own, as columns or flags."""

    wins: Wins = Wins.row
    """Where a row and the command line both set a sampling field or the seeds: row, or command_line."""
    typed: list[str] = field(default_factory=list)
    """Names of the sampling fields (and seeds) that stand on the command line; filled in by the program."""
