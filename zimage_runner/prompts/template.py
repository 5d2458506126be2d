"""Prompts with blanks: ``a photo of {subject}, {style}`` filled from lists or files."""

from __future__ import annotations

import difflib
import enum
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.prompt import Prompt
from zimage_runner.prompts.text import bare, check_text, file_lines

MAX_EXPANSIONS = 1_000_000


class Combine(enum.Enum):
    """How the values of several blanks are combined."""

    product = "product"
    """Every combination."""
    zip = "zip"
    """First with first, second with second; the lists are equally long."""
    random = "random"
    """``count`` different combinations, drawn with ``seed`` and the prompt's own text."""


@dataclass(kw_only=True, slots=True)
class Template:
    """How one prompt becomes many. With nothing set here, braces and underscores in prompts mean nothing."""

    fill: dict[str, Any] = field(default_factory=dict)
    """Blank to values: {subject: [cat, dog], style: styles.txt}; a string names a text file with a value a line."""
    combine: Combine = Combine.product
    """Several blanks: every combination, first with first, or ``count`` combinations at random."""
    count: int = 1
    """How many prompts ``combine=random`` makes of each."""
    seed: int = 0
    """Decides what ``combine=random`` draws."""
    dynamic: bool = False
    """Read {a|b|c}, {2$$a|b|c} and __wildcard__ as the dynamicprompts library does."""
    wildcards: str | None = None
    """Directory of the files that __wildcard__ names."""

    @property
    def is_used(self) -> bool:
        return bool(self.fill or self.dynamic or self.wildcards)


Expand = Callable[[str, str], Iterable[tuple[str, dict[str, str]]]]
"""(text, file:line) -> expanded texts, each with the values that were filled in."""


def expand(prompts: Iterable[Prompt], template: Template) -> Iterator[Prompt]:
    """Each prompt's expansions in its place; what was filled in goes to its metadata."""
    _check(template)
    if not template.is_used:
        yield from prompts
        return
    steps = _steps(template)
    made = 0
    for prompt in prompts:
        texts: list[tuple[str, dict[str, str]]] = [(prompt.text, {})]
        for step in steps:
            texts = [(new, values | more) for text, values in texts for new, more in step(text, prompt.source)]
        if template.combine is Combine.random:
            texts = _drawn(texts, template, prompt)
        made += len(texts)
        if made > MAX_EXPANSIONS:
            raise UserError(
                f"{prompt.source}: the templates make more than {MAX_EXPANSIONS:,} prompts: "
                "set prompts.template.combine=random with prompts.template.count"
            )
        for number, (text, values) in enumerate(texts, start=1):
            yield _expanded(prompt, text, values, number if len(texts) > 1 else None)


def _check(template: Template) -> None:
    """Refuse what would have no effect."""
    if template.count < 1:
        raise UserError(f"prompts.template.count={template.count} is out of range: use 1 or more")
    if template.combine is not Combine.random and (template.count != 1 or template.seed):
        name = "count" if template.count != 1 else "seed"
        raise UserError(
            f"prompts.template.{name}={getattr(template, name)} has no effect with prompts.template.combine="
            f"{template.combine.name}: add prompts.template.combine=random"
        )
    if template.wildcards and not template.dynamic:
        raise UserError("prompts.template.wildcards is set, but prompts.template.dynamic is false: set it to true")


def _drawn(
    texts: list[tuple[str, dict[str, str]]], template: Template, prompt: Prompt
) -> list[tuple[str, dict[str, str]]]:
    """Return ``count`` of what blanks and variants made together; warn if there are fewer."""
    if len(texts) < template.count and texts != [(prompt.text, {})]:
        many = "1 combination" if len(texts) == 1 else f"{len(texts):,} combinations"
        warn_once(
            "count",
            f"{prompt.source}: there {'is' if len(texts) == 1 else 'are'} only {many} for "
            f"prompts.template.count={template.count}: each is made once",
        )
    if len(texts) <= template.count:
        return texts
    places = text_random(template.seed, prompt.text).sample(range(len(texts)), template.count)
    return [texts[place] for place in sorted(places)]


def _expanded(prompt: Prompt, text: str, values: dict[str, str], number: int | None) -> Prompt:
    if text == prompt.text:
        return prompt
    carried = {"template": prompt.text} | ({"values": values} if values else {})
    return replace(
        prompt,
        text=check_text(text, prompt.source),
        id=prompt.id if prompt.id is None or number is None else f"{prompt.id}-{number}",
        index=prompt.index if number is None else None,
        metadata=dict(prompt.metadata) | carried,
    )


def _steps(template: Template) -> list[Expand]:
    steps: list[Expand] = [Blanks(template).expand] if template.fill else []
    if template.dynamic:
        from zimage_runner.prompts.dynamic import DynamicText

        steps.append(DynamicText(template).expand)
    return steps


_BLANK = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


class Blanks:
    """Fills {name}; {{ and }} stand for the braces themselves."""

    def __init__(self, template: Template) -> None:
        self._values = {name: _values(name, given) for name, given in template.fill.items()}
        self._template = template

    def expand(self, text: str, where: str) -> Iterator[tuple[str, dict[str, str]]]:
        """The text with its blanks filled in each way that ``combine`` asks for."""
        names = list(dict.fromkeys(m[1] for m in _BLANK.finditer(text) if m[1]))
        for name in names:
            if name not in self._values:
                close = difflib.get_close_matches(name, self._values, n=1)
                hint = f"did you mean {{{close[0]}}}?" if close else f"add prompts.template.fill.{name}=[...],"
                raise UserError(
                    f"{where}: nothing fills {{{name}}}: {hint} or write {{{{{name}}}}} for the text itself"
                )
        for combination in self._combinations(names, text, where):
            chosen = dict(zip(names, combination, strict=True))
            yield _BLANK.sub(lambda m, chosen=chosen: chosen[m[1]] if m[1] else m[0][0], text), chosen

    def _combinations(self, names: Sequence[str], text: str, where: str) -> Iterable[tuple[str, ...]]:
        lists = [self._values[name] for name in names]
        if not lists:
            return [()]
        if self._template.combine is Combine.zip:
            if len({len(values) for values in lists}) > 1:
                lengths = ", ".join(f"{{{n}}} {len(v)}" for n, v in zip(names, lists, strict=True))
                raise UserError(f"{where}: prompts.template.combine=zip needs lists of one length; values: {lengths}")
            return zip(*lists, strict=True)
        total = math.prod(len(values) for values in lists)
        count = self._template.count
        if self._template.combine is Combine.random and count < total:
            return [_nth(lists, n) for n in sorted(_draw(total, count, self._template.seed, text))]
        if total > MAX_EXPANSIONS:
            raise UserError(f"{where}: {total:,} combinations: set prompts.template.combine=random and .count")
        return itertools.product(*lists)


def _values(name: str, given: Any) -> list[str]:
    """Values of a blank: the list itself, or the lines of a text file."""
    field = f"prompts.template.fill.{name}"
    if isinstance(given, str) and given:
        lines = (bare(line) for _, line in file_lines(Path(given).expanduser(), field))
        given = [line for line in lines if line and not line.startswith("#")]
    if not isinstance(given, list) or not given:
        raise UserError(f"{field}={given!r}: give a list [cat, dog] or a text file with values")
    for value in given:
        # Of these YAML has changed what was written: 3.10 is 3.1 by now, and yes is True.
        if value is None or isinstance(value, bool | float) or not isinstance(value, str | int):
            raise UserError(f"{field}: {value!r} is no text: put it in quotation marks as you want it in the prompt")
    values = [str(value).strip() for value in given]
    if len(set(values)) < len(values):
        twice = max(values, key=values.count)
        raise UserError(f"{field} holds {twice!r} twice: the same prompt would be made twice")
    return values


def _draw(total: int, count: int, seed: int, text: str) -> set[int]:
    """``count`` different numbers below ``total``, which may be astronomically large."""
    rng = text_random(seed, text)
    drawn: set[int] = set()
    if count * 2 > total:
        return set(rng.sample(range(total), count))
    while len(drawn) < count:
        drawn.add(rng.randrange(total))
    return drawn


def text_random(seed: int, text: str) -> random.Random:
    """Random numbers that depend on seed and text alone, so that adding a prompt changes no other's draw."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest(), "big"))


def _nth(lists: Sequence[Sequence[str]], n: int) -> tuple[str, ...]:
    """The n-th tuple of itertools.product(*lists)."""
    chosen = []
    for values in reversed(lists):
        n, index = divmod(n, len(values))
        chosen.append(values[index])
    return tuple(reversed(chosen))
