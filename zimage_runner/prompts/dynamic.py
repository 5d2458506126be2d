"""{a|b|c} and __wildcard__ through the dynamicprompts library (MIT, pure Python, 70 ms to import).

It is off unless asked for: it cuts a prompt at "#", fails on a plain "$" or "%", turns {subject} into "subject", and
keeps the name of a wildcard that is not there. Names in braces belong to ``template.fill``, which runs first; a
missing wildcard is an error here. How much a text makes is counted before the library makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zimage_runner.errors import UserError
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.template import Combine, Template, text_random
from zimage_runner.prompts.text import shown
from zimage_runner.prompts.wildcards import FIELD, find_lists

MAX_VARIANTS = 100_000
"""Of one text; the library makes some 5,000 a second."""
MAX_CHARACTERS = 1_000_000
"""Wildcards that name wildcards twice each grow to any length."""
_SPACES = re.compile("[ \t]{2,}")
"""Empty variants leave them behind."""
_ONE_WORD = re.compile(r"(?<![{$%])\{([A-Za-z_]\w+)\}")


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
        if word := _ONE_WORD.search(text):
            warn_once(
                "blank",
                f"{where}: {word[0]} has one variant, the word itself: prompts.template.fill.{word[1]}=[...] fills it",
            )
        try:
            texts = self._texts(text, where)
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
        yield from ((new, {}) for new in texts)

    def _texts(self, text: str, where: str) -> list[str]:
        size = self._library.size(text)
        if size.longest > MAX_CHARACTERS:
            raise UserError(f"{where}: the variants grow to more than {MAX_CHARACTERS:,} characters: use fewer of them")
        if self._template.combine is Combine.random:
            return self._random(text, size.count)
        if size.count > MAX_VARIANTS:
            raise UserError(f"{where}: more than {MAX_VARIANTS:,} variants: set prompts.template.combine=random")
        return _different(self._library.all(text))

    def _random(self, text: str, total: int) -> list[str]:
        """``count`` different texts, or all there are. The library draws with repetition."""
        count = self._template.count
        rng = text_random(self._template.seed, text)
        seed = rng.getrandbits(64)
        texts = _different(self._library.random(text, count, seed))
        if len(texts) < count and total <= MAX_VARIANTS:
            rest = [other for other in _different(self._library.all(text)) if other not in set(texts)]
            return [*texts, *rng.sample(rest, min(count - len(texts), len(rest)))]
        for tries in (2, 4, 8):
            if len(texts) < count:
                texts = _different(self._library.random(text, tries * count, seed))[:count]
        return texts


def _different(texts: Sequence[str]) -> list[str]:
    """Different choices may give equal text, which would be the same picture."""
    return list(dict.fromkeys(_SPACES.sub(" ", t).strip() for t in texts if t.strip()))


class _MissingWildcardError(Exception):
    pass


class Size(NamedTuple):
    """What a text makes."""

    count: int
    """Combinations; equal ones count each."""
    longest: int
    """Characters of the longest."""


class _Library:
    """The few calls of dynamicprompts that are used."""

    def __init__(self, directory: Path | None) -> None:
        try:
            from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
            from dynamicprompts.parser.parse import parse
            from dynamicprompts.wildcards import WildcardManager
            from dynamicprompts.wildcards.collection.list import ListWildcardCollection
            from dynamicprompts.wildcards.item import WildcardItem
            from dynamicprompts.wildcards.tree import WildcardTree
            from dynamicprompts.wildcards.values import WildcardValues
            from pyparsing import ParseBaseException
        except ImportError:
            raise UserError("prompts.template.dynamic=true needs a library: pip install dynamicprompts") from None

        class Collection(ListWildcardCollection):
            def get_values(self) -> Any:
                values = self.source.values()
                scale = 1 / min([1.0, *(v.weight for v in values)])  # the library cuts weights to whole numbers
                return [WildcardItem(v.text, min(max(1.0, v.weight * scale), 1000.0)) for v in values]

        class Wildcards(WildcardManager):
            weighted = False

            @property
            def tree(self) -> Any:
                if self._tree is None:
                    lists = find_lists(directory) if directory else {}
                    found: dict[str, Any] = {n: Collection(entries=(), source=listed) for n, listed in lists.items()}
                    self._tree = WildcardTree.from_map(found)
                return self._tree

            def get_values(self, wildcard: str) -> Any:
                values = super().get_values(wildcard)
                if not values:
                    where = (
                        f"no {wildcard}.txt with values in {shown(directory)}"
                        if directory
                        else "set prompts.template.wildcards=FOLDER"
                    )
                    raise _MissingWildcardError(f"nothing fills __{wildcard}__: {where}")
                # Every combination is made once, whatever its weight.
                return values if self.weighted else WildcardValues.from_items(dict.fromkeys(values.string_values))

        self.errors = (ParseBaseException, ValueError, IndexError, KeyError)
        self._wildcards = Wildcards(directory)
        self._all, self._random, self._parse = CombinatorialPromptGenerator, RandomPromptGenerator, parse
        self._sizes: dict[str, Size | None] = {}

    def all(self, text: str) -> list[str]:
        self._wildcards.weighted = False
        return self._all(wildcard_manager=self._wildcards).generate(text, MAX_VARIANTS + 1)

    def random(self, text: str, count: int, seed: int) -> list[str]:
        self._wildcards.weighted = True
        return self._random(wildcard_manager=self._wildcards, seed=seed).generate(text, count)

    def size(self, text: str) -> Size:
        """How many texts this makes and how long they are at most, without making them."""
        self._wildcards.weighted = False
        return self._size(self._parse(text), {})

    def _size(self, command: Any, variables: dict[str, Size]) -> Size:
        kind = type(command).__name__
        if kind == "LiteralCommand":
            return Size(1, len(command.literal))
        if kind == "SequenceCommand":
            return _together([self._size(token, variables) for token in command.tokens])
        if kind == "VariantCommand":
            return self._size_of_variant(command, variables)
        if kind == "WildcardCommand":
            return self._size_of_wildcard(command)
        if kind == "WrapCommand":
            return _together([self._size(command.wrapper, variables), self._size(command.inner, variables)])
        if kind == "VariableAssignmentCommand":
            variables[command.name] = self._size(command.value, variables)
            return Size(1, 0)
        if kind == "VariableAccessCommand" and command.name in variables:
            return variables[command.name]
        default = getattr(command, "default", None)
        return self._size(default, variables) if default is not None else Size(1, 0)

    def _size_of_variant(self, command: Any, variables: dict[str, Size]) -> Size:
        values = command.values
        if len(values) == 1 and type(values[0]).__name__ == "WildcardCommand":
            sizes = [self._size_of_text(text) for name in self._names(values[0]) for text in self._texts_of(name)]
        else:
            sizes = [self._size(value, variables) for value in values]
        if not sizes:
            return Size(1, 0)
        high = min(command.max_bound, len(sizes))
        longest = high * (max(s.longest for s in sizes) + len(command.separator))
        return Size(_arrangements([s.count for s in sizes], min(command.min_bound, high), high), longest)

    def _size_of_wildcard(self, command: Any) -> Size:
        sizes = [self._size_of_text(text) for name in self._names(command) for text in self._texts_of(name)]
        return Size(sum(s.count for s in sizes), max(s.longest for s in sizes))

    def _names(self, command: Any) -> list[str]:
        name = command.wildcard
        if isinstance(name, str):
            return [name]
        self._wildcards.weighted = False
        context = self._all(wildcard_manager=self._wildcards)._context
        return [str(result) for result in context.sample_prompts(name, 1000)]

    def _texts_of(self, name: str) -> list[str]:
        return self._wildcards.get_values(name).string_values

    def _size_of_text(self, text: str) -> Size:
        if text not in self._sizes:
            self._sizes[text] = None
            self._sizes[text] = self._size(self._parse(text), {})
        size = self._sizes[text]
        if size is None:
            raise RecursionError
        return size


def _together(sizes: Sequence[Size]) -> Size:
    return Size(math.prod(s.count for s in sizes), sum(s.longest for s in sizes))


def _arrangements(counts: Sequence[int], low: int, high: int) -> int:
    """Ways to choose ``low`` to ``high`` of them in any order, each in one of its ``counts`` ways."""
    ways = [1] + [0] * high  # elementary symmetric polynomials
    for count in counts:
        for chosen in range(high, 0, -1):
            ways[chosen] += ways[chosen - 1] * count
    return sum(math.factorial(chosen) * ways[chosen] for chosen in range(low, high + 1))


def _directory(template: Template) -> Path | None:
    if template.wildcards is None:
        return None
    directory = Path(template.wildcards).expanduser()
    if not directory.is_dir():
        raise UserError(f"{FIELD}={template.wildcards} is not a directory")
    return directory
