"""{a|b|c} and __wildcard__ through the dynamicprompts library (MIT, pure Python, 70 ms to import).

It is off unless asked for: it cuts a prompt at "#", fails on a plain "$" or "%", turns {subject} into "subject", and
keeps the name of a wildcard that is not there. Names in braces belong to ``template.fill``, which runs first; a
missing wildcard is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.template import MAX_EXPANSIONS, Combine, Template, text_random

_SPACES = re.compile("[ \t]{2,}")
"""Empty variants leave them behind."""


class DynamicText:
    """Expands one text at a time; ``combine=random`` draws ``count``, otherwise every combination is made."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._library = _Library(_directory(template))

    def expand(self, text: str, where: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Different texts in the library's order."""
        if not any(sign in text for sign in "{}$%#") and "__" not in text:
            yield text, {}
            return
        try:
            texts = self._texts(text)
        except _MissingWildcardError as error:
            raise UserError(f"{where}: {error}") from None
        except RecursionError:
            raise UserError(f"{where}: the variants are nested too deeply") from None
        except self._library.errors as error:
            raise UserError(
                f"{where}: cannot read the variants: {error}: write {{a|b}} or __file__, and no lone $, % or {{"
            ) from None
        if not texts:
            raise UserError(f"{where}: the variants come out empty")
        if len(texts) > MAX_EXPANSIONS:
            raise UserError(f"{where}: more than {MAX_EXPANSIONS:,} variants: set prompts.template.combine=random")
        yield from ((new, {}) for new in texts)

    def _texts(self, text: str) -> list[str]:
        if self._template.combine is Combine.random:
            seed = text_random(self._template.seed, text).getrandbits(64)
            texts = self._library.random(text, self._template.count, seed)
        else:
            texts = self._library.all(text)
        # Different choices may give equal text, which would be the same picture.
        return list(dict.fromkeys(_SPACES.sub(" ", t).strip() for t in texts if t.strip()))


class _MissingWildcardError(Exception):
    pass


class _Library:
    """The few calls of dynamicprompts that are used."""

    def __init__(self, directory: Path | None) -> None:
        try:
            from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
            from dynamicprompts.wildcards import WildcardManager
            from pyparsing import ParseBaseException
        except ImportError:
            raise UserError("prompts.template.dynamic=true needs a library: pip install dynamicprompts") from None

        class Wildcards(WildcardManager):
            def get_values(self, wildcard: str) -> Any:
                values = super().get_values(wildcard)
                if not values:
                    where = (
                        f"no {wildcard}.txt with values in {directory}"
                        if directory
                        else "set prompts.template.wildcards=FOLDER"
                    )
                    raise _MissingWildcardError(f"nothing fills __{wildcard}__: {where}")
                return values

        self.errors = (ParseBaseException, ValueError, IndexError, KeyError)
        self._wildcards = Wildcards(directory)
        self._all, self._random = CombinatorialPromptGenerator, RandomPromptGenerator

    def all(self, text: str) -> list[str]:
        return self._all(wildcard_manager=self._wildcards).generate(text, MAX_EXPANSIONS + 1)

    def random(self, text: str, count: int, seed: int) -> list[str]:
        return self._random(wildcard_manager=self._wildcards, seed=seed).generate(text, count)


def _directory(template: Template) -> Path | None:
    if template.wildcards is None:
        return None
    directory = Path(template.wildcards).expanduser()
    if not directory.is_dir():
        raise UserError(f"prompts.template.wildcards={template.wildcards} is not a directory")
    return directory
