"""Words of other programs in prompts, which the model reads as text: a warning of each kind says what to do instead.

Z-Image's text encoder reads sentences. ComfyUI's and diffusers' Z-Image pass ``(red:1.4)`` on as it stands, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.prompt import Prompt
from zimage_runner.prompts.vocabulary import FIELD_OF

DRAWN_AS_TEXT = "is drawn as text"
_LORA = re.compile(r"<(?:lora|lyco|lycoris):([^<>:]+)(?::([^<>]*))?>", re.IGNORECASE)
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"


@dataclass(frozen=True, slots=True)
class LoraTag:
    """``<lora:name:0.8>`` in a prompt."""

    name: str
    weight: float
    """1 where none is given."""
    start: int
    end: int
    """Where it stands: ``text[start:end]``."""


def lora_tags(text: str) -> list[LoraTag]:
    """The LoRA tags of a prompt in their order; of several numbers (``:te=0.5``) the first counts."""
    found = []
    for match in _LORA.finditer(text):
        number = re.search(_NUMBER, match[2] or "")
        weight = float(number[0]) if number else 1.0
        found.append(LoraTag(match[1].strip(), weight, match.start(), match.end()))
    return found


def _lora(text: str) -> str | None:
    tags = lora_tags(text)
    return text[tags[0].start : tags[0].end] if tags else None


def _first(pattern: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def find(text: str) -> str | None:
        match = compiled.search(text)
        return match[0].strip() if match else None

    return find


_VARIANTS = _first(r"\{[^{}|]*\|[^{}]*\}|(?<!\w)__[A-Za-z*][\w/*-]*__(?!\w)")
_BLANK = re.compile(r"(?<!\{)\{([A-Za-z_]\w+)\}(?!\})")
_ANY_FLAG = re.compile(r"(?<!\S)--([A-Za-z][\w-]*)(?:[= ]+([^\s-]\S*))?")


def _known_flag(text: str) -> str | None:
    for match in _ANY_FLAG.finditer(text):
        if remedy_for_flag(match[1], match[2] or ""):
            return match[0].strip()
    return None


def _lone_and(text: str) -> str | None:
    """AND between clauses that are not all in capitals themselves, as a sign's text may be."""
    match = re.search(r"(?<!\S)(\S+)\s+AND\s+(\S+)", text)
    return "AND" if match and not (match[1].isupper() or match[2].isupper()) else None


KINDS: dict[str, tuple[Callable[[str], str | None], str]] = {
    "lora": (_lora, "lora_dirs=[FOLDER] says where its file is"),
    "embedding": (
        _first(r"(?<![\w:])embedding:[\w.-]+|<(?:hypernet|wildcard|random|segment|setvar):[^<>]*>"),
        "textual inversions and other tools' tags are not read; leave it out",
    ),
    "weight": (
        _first(r"\([^()]*[^()\d\s]:[+-]?(?:\d(?:\.\d+)?|\.\d+)\)|\([^()]*:\s*[+-]?\d*\.\d+\s*\)|\(\([^()]+\)\)"),
        "Z-Image has no weights for words; say it in words, or say it first",
    ),
    "schedule": (
        _first(rf"\[[^\[\]:]*:[^\[\]:]*:\s*{_NUMBER}\s*\]|\[[^\[\]|]+\|[^\[\]]+\]"),
        "a prompt is the same at every step; write the prompt of the picture that you want",
    ),
    "break": (_first(r"(?<!\S)BREAK(?![^\s,])"), "there are no chunks of 75 tokens to part; leave it out"),
    "and": (_lone_and, "prompts are not combined; write one sentence"),
    "flag": (_known_flag, ""),
}
"""Each kind: how it is found in a text, and what to do instead. A flag's remedy depends on which it is."""
_SIGNS = re.compile(r"[<:(\[|{]|--|__|BREAK|AND")
_FLAG_FIELDS = {"width", "height", "num_inference_steps", "guidance_scale", "negative_prompt", "seeds"}
_OTHER_FLAGS = {
    ("ar", "aspect"): "set the size, --w 1344 --h 768 on text lines or sampling.width and sampling.height.",
    ("v", "version", "niji", "model", "sd_model"): "the model is chosen for the whole run, model=NAME.",
    ("stylize", "style", "sref", "cref", "oref", "personalize", "profile"): "say the style in words.",
    ("chaos", "c", "weird", "q", "quality", "hd", "raw", "fast", "relax", "turbo", "stop", "repeat"): (
        "it has no counterpart here, leave it out."
    ),
    ("tile", "tiling"): "pictures that tile are not made, leave it out.",
    ("cn", "ctrl_img"): "the picture that a ControlNet follows is --control_image FILE.",
    ("iw",): "how much of a picture is drawn anew is --strength 0.6, with --image FILE.",
    ("m", "a"): "weights of the run's loras are --am 0.8,0.4.",
    ("sampler", "sampler_name", "sampler_index", "ss", "scheduler"): "Euler is the model's own sampler, leave it out.",
    ("fs", "flow_shift", "shift"): "the shift of the schedule is the model's own, leave it out.",
    ("batch_size", "n_iter", "count", "num"): "for several pictures give several seeds, --d 1-4 or seeds=1-4.",
    ("f", "outpath_samples", "outpath_grids", "ow", "oh"): "files are named by prompt and seed, leave it out.",
    ("clip_skip", "nl", "restore_faces", "eta", "styles"): ("it has no counterpart for Z-Image, leave it out."),
}
"""Flags of Midjourney, A1111's script, kohya-ss and musubi-tuner that are none here."""
_REMEDIES = {name: remedy for names, remedy in _OTHER_FLAGS.items() for name in names}


def remedy_for_flag(flag: str, value: str) -> str | None:
    """What to do instead of another tool's ``--flag value``; None where the flag is nobody's."""
    word = flag.replace("-", "_")
    if (remedy := _REMEDIES.get(word)) is not None:
        return remedy
    field = FIELD_OF.get(word, word)
    if field not in _FLAG_FIELDS or not value:
        return None
    setting = "seeds" if field == "seeds" else f"sampling.{field}"
    return f"flags are read on the lines of text files; {setting} is for the whole run."


def warn_foreign(prompts: Iterable[Prompt]) -> None:
    """Say once for each kind of foreign word where it stands first and what to do instead."""
    open_kinds = dict(KINDS)
    look = True, True
    for prompt in prompts:
        negative = prompt.overrides.get("negative_prompt")
        for text in (prompt.text, negative) if negative else (prompt.text,):
            if not _SIGNS.search(text):
                continue
            for kind, (find, remedy) in list(open_kinds.items()):
                if found := find(text):
                    del open_kinds[kind]
                    warn_once(kind, f"{prompt.source}: {found} {DRAWN_AS_TEXT}: {remedy or _remedy(found)}")
            if "template" not in prompt.metadata:  # else blanks and variants were filled, and braces are meant
                look = _tell_blanks(prompt.source, text, look)
        if not open_kinds and not any(look):
            return


def _remedy(flag: str) -> str:
    match = _ANY_FLAG.match(flag)
    return (remedy_for_flag(match[1], match[2] or "") or "").rstrip(".") if match else ""


def _tell_blanks(source: str, text: str, look: tuple[bool, bool]) -> tuple[bool, bool]:
    """Variants and blanks that nothing fills; which of the two are still looked for."""
    variants, blanks = look
    if variants and (found := _VARIANTS(text)):
        warn_once(
            "variants", f"{source}: {found} is drawn as it is: prompts.template.dynamic=true makes variants of it"
        )
        variants = False
    if blanks and (blank := _BLANK.search(text)):
        fill = f"prompts.template.fill.{blank[1]}='[one,two]'"
        warn_once("blank", f"{source}: {blank[0]} {DRAWN_AS_TEXT}: {fill} fills it")
        blanks = False
    return variants, blanks
