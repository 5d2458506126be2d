"""Free text on the command line: quoted before Hydra's grammar sees it.

Hydra 1.3 answers ``prompt=一只猫`` with "token recognition error" and ``prompt=a (8k) cat`` with "Unknown
function", so the fields that hold free text are always quoted, unless the user already quoted them for Hydra.
Lists of free text are ``free_lists``'s affair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from zimage_runner.cli.free_lists import field_of, quote_entries

FREE_TEXT_FIELDS = frozenset(
    {
        "prompt",
        "output_file",
        "sampling.negative_prompt",
        "prompts.path",
        "prompts.glob",
        "prompts.delimiter",
        "model.path",
        "resume",
        "skip_existing",
    }
)
"""Texts and paths, which may hold blanks, brackets and any script.

A path is a sweep in a multirun only when its values are quoted one by one, like a prompt's."""
OPEN_MAPPINGS = ("prompts.columns", "prompts.template.fill")
"""Mappings whose keys are the user's own. Hydra wants ``++`` before a new key, which nobody should have to know."""
_ASSIGNMENT = re.compile(r"(?sa)(?P<key>\+{0,2}[\w./@]+)=(?P<value>.*)")


def quote_free_text(argv: Sequence[str], multirun: bool | None = None) -> list[str]:
    """Quote the values of free-text fields for Hydra's override grammar.

    A value already in matching quotes is left alone; so is ``null``. In a multirun ``prompt='"a","b"'`` and
    ``prompt=choice("a", "b")`` stay sweeps.
    """
    multirun = is_multirun(argv) if multirun is None else multirun
    return [_quote(arg, multirun) for arg in argv]


def is_multirun(argv: Sequence[str]) -> bool:
    return any(arg in ("-m", "--multirun") or arg == "hydra.mode=MULTIRUN" for arg in argv)


def _quote(arg: str, multirun: bool) -> str:
    match = _ASSIGNMENT.fullmatch(arg)
    if match and match["key"] == "seeds" and re.fullmatch(r"\s*\{[^{}]*\}\s*", match["value"]):
        return f"seeds={hydra_quote(match['value'])}"  # OmegaConf cannot put a mapping where a list was
    if match and field_of(name := match["key"].lstrip("+")):
        key = f"++{name}" if _is_open(name) else match["key"]
        return f"{key}={quote_entries(name, match['value'], multirun, hydra_quote)}"
    is_free_text = match is not None and match["key"].lstrip("+") in FREE_TEXT_FIELDS
    if match and not is_free_text and _is_foreign(match["value"]):
        values = match["value"].split(",") if multirun else [match["value"]]
        return f"{match['key']}={','.join(hydra_quote(value.strip()) for value in values)}"
    if not match or not is_free_text:
        return arg
    value = match["value"]
    if value == "null" or _is_quoted(value) or (multirun and _is_sweep(value)):
        return arg
    return f"{match['key']}={hydra_quote(value)}"


def _is_foreign(value: str) -> bool:
    """True for plain words with a sign that Hydra's grammar has not, such as a folder's Chinese name, or ``~/x``."""
    return (not value.isascii() or value.startswith("~/")) and re.fullmatch(r"[^\[\]{}()\"'$\\=]+", value) is not None


def _is_open(key: str) -> bool:
    return any(key == mapping or key.startswith(f"{mapping}.") for mapping in OPEN_MAPPINGS)


def hydra_quote(text: str) -> str:
    """A double-quoted string of Hydra's grammar that parses to exactly ``text``.

    A backslash only escapes when it stands before a quote, so only backslashes directly before a double quote
    (or the closing one) are doubled. ``${`` would start an interpolation, so its dollar is escaped for OmegaConf.
    """
    escaped = re.sub(r'(\\*)"', lambda m: m[1] * 2 + '\\"', text)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    escaped = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", escaped)
    return f'"{escaped}"'


def _is_quoted(value: str) -> bool:
    """True for one complete quoted string, such as "a cat" - not for "a" and "b"."""
    return re.fullmatch(r'(?s)"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', value) is not None


def _is_sweep(value: str) -> bool:
    """A sweep the user spelled out: quoted strings with commas between them, or choice(...) / glob(...)."""
    quoted = r'(?:"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')'
    return re.fullmatch(rf"(?s)\s*{quoted}(?:\s*,\s*{quoted})+\s*|(?:choice|shuffle|sort)\(.*\)", value) is not None
