"""Flags at the end of a text line: ``a cat --w 512 --h 768 --s 8 --d 1,2 --n blurry --g 4``.

The short names are those of kohya-ss/sd-scripts and of the tools that took them over; the long ones are those of
AUTOMATIC1111's "Prompts from file" script and of Midjourney, as far as they mean the same here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.rows import convert
from zimage_runner.prompts.seeds import parse_seed_list

FLAGS = {
    "w": "width",
    "width": "width",
    "h": "height",
    "height": "height",
    "s": "num_inference_steps",
    "steps": "num_inference_steps",
    "d": "seeds",
    "seed": "seeds",
    "n": "negative_prompt",
    "no": "negative_prompt",
    "negative_prompt": "negative_prompt",
    "g": "guidance_scale",
    "l": "guidance_scale",
    "cfg_scale": "guidance_scale",
}
ALMOST = re.compile(r"(?<!\S)([-\u2013\u2014])([whsdngl])\s+(?=[\d\"'])")
"""A flag with one hyphen, or with the long dash that word processors make of two."""
_FLAG = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=\s|$)")


@dataclass(kw_only=True, slots=True)
class FlaggedText:
    """A line taken apart."""

    text: str
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None


def parse_flags(line: str, where: str) -> FlaggedText:
    """Split a line at its flags. Each flag's value runs to the next flag; quotes around it are dropped."""
    if almost := ALMOST.search(line):
        raise UserError(
            f"{where}: {almost[1]}{almost[2]} looks like a flag: write --{almost[2]} with two hyphens; "
            "if it is part of the text, set prompts.flags=false"
        )
    first = _FLAG.search(line)
    if first is None:
        return FlaggedText(text=line)
    parsed = FlaggedText(text=line[: first.start()].strip())
    matches = list(_FLAG.finditer(line))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        value = line[match.end() : following.start() if following else len(line)]
        _apply(parsed, match[1], _unquote(value.strip()), where)
    return parsed


def _apply(parsed: FlaggedText, flag: str, value: str, where: str) -> None:
    name = FLAGS.get(flag)
    if name is None:
        close = difflib.get_close_matches(flag, FLAGS, n=1)
        hint = f"did you mean --{close[0]}?" if close else "the flags are --w --h --s --d --n --g."
        raise UserError(f"{where}: unknown flag --{flag}: {hint} If it is part of the text, set prompts.flags=false")
    if not value:
        raise UserError(f"{where}: --{flag} has no value: write it after a space")
    if name in parsed.overrides or (name == "seeds" and parsed.seeds is not None):
        raise UserError(f"{where}: --{flag} sets {name} a second time: keep one")
    if name == "seeds":
        parsed.seeds = parse_seed_list(value, f"{where}: --{flag}")
    else:
        parsed.overrides[name] = convert(name, value, f"{where}: --{flag}")


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
