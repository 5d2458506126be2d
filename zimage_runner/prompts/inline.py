"""Prompts written in the config or on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import INPUT, Prompt, PromptSource
from zimage_runner.prompts.text import check_text


@dataclass(kw_only=True, slots=True)
class Inline(PromptSource):
    """``prompts=inline prompts.texts='["a cat","一只猫"]'``"""

    texts: list[str] = field(default_factory=list, metadata=INPUT)
    """One prompt each, taken as they are."""

    def read(self) -> Iterator[Prompt]:
        if not self.texts:
            raise UserError("prompts.texts is empty: write prompt='a cat' or prompts.texts='[\"a cat\",\"a dog\"]'")
        for number, text in enumerate(self.texts):
            where = f"prompts.texts[{number}]"
            yield Prompt(text=check_text(text, where), source=where)
