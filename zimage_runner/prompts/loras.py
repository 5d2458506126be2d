"""Adapters that prompts name: ``<lora:name:0.8>`` in the text, a ``lora`` column, ``--am`` on text lines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from zimage_runner.errors import UserError, one_line
from zimage_runner.prompts.foreign import LoraTag, lora_tags
from zimage_runner.prompts.prompt import LoraWord, Prompt

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WORD = re.compile(rf"(?s)(?P<name>.+?)\s*:\s*(?P<weight>{NUMBER})\s*")
EXAMPLE = "style.safetensors:0.8"


def parse_lora(text: str, where: str) -> LoraWord:
    """Read ``NAME:WEIGHT``; without a weight it is 1. Raises UserError."""
    match = _WORD.fullmatch(text)
    name, weight = (match["name"].strip(), float(match["weight"])) if match else (text.strip(), 1.0)
    if not name or "\0" in name or "\n" in name:
        raise UserError(f"{where}={one_line(text, 80)!r} names no adapter file: write {EXAMPLE}")
    return LoraWord(name, weight)


def parse_loras(value: object, where: str) -> tuple[LoraWord, ...]:
    """Read a table's cell: ``a:0.8, b:-0.3``, a list of such texts, or of {path, weight}. Raises UserError."""
    entries = value if isinstance(value, list | tuple) else str(value).split(",") if isinstance(value, str) else None
    if entries is None:
        raise UserError(f"{where}={one_line(repr(value), 60)} is neither a text nor a list: write {EXAMPLE}")
    return tuple(_entry(entry, where) for entry in entries)


def parse_weights(value: object, where: str) -> tuple[float, ...]:
    """Read ``0.8,0.4``, a number or a list of them. Raises UserError."""
    entries = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        if any(isinstance(entry, bool) for entry in entries):
            raise ValueError
        weights = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(map(math.isfinite, weights)):
        raise UserError(
            f"{where}={one_line(str(value), 60)}: give a weight for each of the run's loras, such as 0.8,0.4"
        )
    return weights


def take_tags(prompt: Prompt) -> Prompt:
    """The prompt without the ``<lora:...>`` tags of its text, which become adapters of it. Raises UserError."""
    tags = lora_tags(prompt.text)
    if not tags:
        return prompt
    words = tuple(_of_tag(tag, prompt) for tag in tags)
    text = prompt.text
    for tag in reversed(tags):
        text = _without(text, tag)
    if not text:
        raise UserError(f"{prompt.source}: there is nothing but LoRA tags: say what the picture shows")
    return replace(prompt, text=text, loras=(*prompt.loras, *words))


def _entry(entry: object, where: str) -> LoraWord:
    if isinstance(entry, str):
        return parse_lora(entry, where)
    if isinstance(entry, Mapping) and {"path"} <= entry.keys() <= {"path", "weight"}:
        name, weight = entry["path"], entry.get("weight", 1.0)
        if isinstance(name, str) and isinstance(weight, int | float) and not isinstance(weight, bool):
            return parse_lora(f"{name}:{float(weight)!r}", where)
    raise UserError(f"{where}: {one_line(repr(entry), 60)} names no adapter: write {EXAMPLE}")


def _of_tag(tag: LoraTag, prompt: Prompt) -> LoraWord:
    written = prompt.text[tag.start : tag.end]
    said = written[1:-1].split(":", 2)[2:]
    if said and not re.fullmatch(rf"\s*{NUMBER}\s*", said[0]):
        raise UserError(f"{prompt.source}: {one_line(written, 80)}: one weight is read, <lora:{tag.name}:0.8>")
    return LoraWord(tag.name, tag.weight)


def _without(text: str, tag: LoraTag) -> str:
    """The text without a tag, nor the second of two blanks or commas that it stood between."""
    before, after = text[: tag.start].rstrip(), text[tag.end :].lstrip()
    if after.startswith(",") and (not before or before.endswith(",")):
        after = after[1:].lstrip()
    if not after:
        before = before.removesuffix(",").rstrip()
    glue = "" if not before or not after or after[0] in ",.;:!?" else " "
    return before + glue + after
