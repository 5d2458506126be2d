"""Flags at the end of a text line: ``a cat --w 512 --h 768 --s 8 --d 1,2 --n blurry --g 4``.

The short names are those of kohya-ss/sd-scripts and of the tools that took them over; the long ones are those of
AUTOMATIC1111's "Prompts from file" script and of Midjourney, as far as they mean the same here. All stand in
``vocabulary``. What looks like a flag and is none is refused, because it would be drawn.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.foreign import remedy_for_flag
from zimage_runner.prompts.loras import parse_loras, parse_weights
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.picture_values import picture_value
from zimage_runner.prompts.prompt import LoraWord
from zimage_runner.prompts.rows import SAMPLING_KINDS, convert, seeds_of
from zimage_runner.prompts.vocabulary import FIELD_OF, LETTERS, NAMES, is_cfg
from zimage_runner.sampling import PICTURE_FIELDS

FLAGS = {
    **{name: name for name in ("seeds", *SAMPLING_KINDS, *PICTURE_FIELDS, "loras", "lora_weights")},
    **FIELD_OF,
    **LETTERS,
}
"""Name of a flag, with underscores, to the field that it sets."""
_NUMBERS = "|".join(
    sorted(n for f in ("seeds", "width", "height", "num_inference_steps", "guidance_scale") for n in (f, *NAMES[f]))
)
_LONG_TEXT = "negative_prompt|negative-prompt|negative|neg_prompt"
ALMOST = re.compile(
    r"(?<!\S)(?P<dash>[-\u2013\u2014])(?P<name>(?:[sdgl]|" + _NUMBERS + r")(?=(?:\s+|=)[\d\"'])"
    r"|n(?=\s+\S|=)|(?:" + _LONG_TEXT + r")(?=\s+\S|=))"
    r"|(?<=[^\s-])(?P<glued>--)(?P<word>(?:[sdgl]|" + _NUMBERS + r")(?=(?:\s+|=)[\d\"'])"
    r"|(?:n|" + _LONG_TEXT + r")(?=\s+\S|=))"
)
"""A flag with one hyphen, with the long dash that word processors make of two, or without a blank before it."""
_FLAG = re.compile(r"(?:^|(?<=\s))--(?P<name>[A-Za-z][\w-]*)(?:=|(?=\s|$))")


@dataclass(kw_only=True, slots=True)
class FlaggedText:
    """A line taken apart."""

    text: str
    overrides: dict[str, Any] = field(default_factory=dict)
    loras: tuple[LoraWord, ...] = ()
    lora_weights: tuple[float, ...] = ()
    seeds: tuple[int, ...] | None = None


def parse_flags(line: str, where: str, folder: Path | None = None) -> FlaggedText:
    """Split a line at its flags. Each flag's value runs to the next flag; quotes around it are dropped.

    So are quotes around the text before the flags. ``--prompt TEXT`` gives the text itself. ``folder``: where names of
    picture files start; None is where the program was started.
    """
    if almost := ALMOST.search(line):
        raise UserError(f"{where}: {_almost(almost)}; if it is part of the text, set prompts.flags=false")
    matches = list(_FLAG.finditer(line))
    if not matches:
        return FlaggedText(text=line)
    parsed = FlaggedText(text=_unquote(line[: matches[0].start()].strip()))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        value = line[match.end() : following.start() if following else len(line)]
        _apply(parsed, match["name"], _unquote(value.strip()), where, folder or Path())
    return parsed


def _almost(match: re.Match[str]) -> str:
    if match["glued"]:
        return f"--{match['word']} looks like a flag: write a blank before it"
    name = match["name"]
    return f"{match['dash']}{name} looks like a flag: write --{name} with two hyphens"


def _apply(parsed: FlaggedText, flag: str, value: str, where: str, folder: Path) -> None:
    word = flag.replace("-", "_")
    name = FLAGS.get(word)
    if name is None:
        close = difflib.get_close_matches(word, FLAGS, n=1)
        known = "the flags are --w --h --s --d --n --g --lora and the sampling fields."
        hint = remedy_for_flag(flag, value) or (f"did you mean --{close[0]}?" if close else known)
        raise UserError(f"{where}: unknown flag --{flag}: {hint} If it is part of the text, set prompts.flags=false")
    if not value:
        raise UserError(f"{where}: --{flag} has no value: write it after a space")
    if name in parsed.overrides or getattr(parsed, name, None):
        raise UserError(f"{where}: --{flag} sets {name} a second time: keep one")
    if name == "text":
        parsed.text = value
    elif name == "seeds":
        parsed.seeds = seeds_of(value, f"{where}: --{flag}")
    elif name == "loras":
        parsed.loras = parse_loras(value, f"{where}: --{flag}")
    elif name == "lora_weights":
        parsed.lora_weights = parse_weights(value, f"{where}: --{flag}")
    elif name in PICTURE_FIELDS:
        parsed.overrides[name] = picture_value(name, value, f"{where}: --{flag}", folder)
    else:
        parsed.overrides[name] = convert(name, value, f"{where}: --{flag}", cfg=is_cfg(word))
        if is_cfg(word):
            warn_once(
                "cfg",
                f"{where}: --{flag} {value} is other tools' CFG scale, where 1 is no guidance: it is drawn with "
                f"guidance_scale={parsed.overrides[name]:g}, which is --g",
            )


def _unquote(value: str) -> str:
    """Without the quotes around it, if they are one pair around the whole."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        inside = value[1:-1]
        return value if re.search(rf"(?<!\\){value[0]}", inside) else inside.replace(f"\\{value[0]}", value[0])
    return value
