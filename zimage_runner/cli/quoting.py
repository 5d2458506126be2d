"""Free text on the command line: quoted before Hydra's grammar sees it.

Hydra 1.3 answers ``prompt=一只猫`` with "token recognition error" and ``prompt=a (8k) cat`` with "Unknown
function", so fields with the metadata FREE_TEXT are always quoted, unless the user already quoted them for Hydra.
Lists and mappings of free text are quoted entry by entry: ``prompts.texts=[一只猫, it's a dog]`` and the same with
quotes that the shell has eaten mean what they say. A comma ends an entry, unless it stands in quotes or within brackets
of the entry's own: ``[a cat (8k, hdr), a dog]`` are two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from zimage_runner.cli.fields import free_texts, reader_of, texts
from zimage_runner.config.schema import MISSING
from zimage_runner.errors import UserError, one_line
from zimage_runner.prompts.loras import parse_lora
from zimage_runner.prompts.text import unquoted

OPEN_MAPPINGS = ("prompts.columns", "prompts.template.fill", "executor.resources")
"""Mappings whose keys are the user's own. Hydra wants ``++`` before a new key, which nobody should have to know."""
EXAMPLES = {
    "prompts.texts": """'["a cat, neon","一只猫"]'""",
    "prompts.metadata": """'["author","标题"]'""",
    "prompts.columns": """'{text: "标题"}'""",
    "prompts.template.fill": """'{subject: ["a cat","狗"]}'""",
    "lora_dirs": """'["/data/loras"]'""",
    "executor.resources": "'{tpu: 1}'",
}
"""Fields whose entries are free text, each with a form that works in any shell."""
LORAS_EXAMPLE = "'loras=[style.safetensors:0.8,grain.safetensors:-0.3]'"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_QUOTED = re.compile(r'(?s)"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z][A-Za-z0-9_.+-]*|0|[1-9][0-9]{0,17}", re.IGNORECASE)
"""What means the same to Hydra without quotes. Of other numbers it would lose what was typed (3.10, 007, 1_000)."""
_PLAIN_WORDS = re.compile(r"[^\[\]{}()\"'$\\=]+")
"""No list, no mapping, no function, no interpolation, nothing quoted."""
_FUNCTIONS = ("choice", "range", "interval", "glob", "shuffle", "sort", "tag", "int", "float", "str", "bool")
"""Hydra's functions. What else stands before a bracket, as in ``my_cats_(1)``, is a part of the text."""
_WITH_BRACKETS = re.compile(rf"(?![\[{{])(?!(?:{'|'.join(_FUNCTIONS)}|json_str|extend_list)\()[^,\"'$\\]+")
_LOST_QUOTES = re.compile(r"[^,\s][^,]*,[^\s\d]")
"""Words with a comma that no blank follows: nobody writes a sentence so, but a shell makes it of "a cat","a dog"."""
_QUOTED_CHOICE = re.compile(rf"(?s)choice\(\s*((?:{_QUOTED.pattern[4:]})(?:\s*,\s*(?:{_QUOTED.pattern[4:]}))*)\s*\)")
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
"""Hydra's escapes outside of quotes."""
_KEY = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_ASSIGNMENT = re.compile(r"(?sa)(?P<key>\+{0,2}[\w./@]+)=(?P<value>.*)")


def quote_free_text(argv: Sequence[str], multirun: bool | None = None) -> list[str]:
    """Quote the values of free-text fields for Hydra's override grammar.

    A value already in matching quotes is left alone; so is ``null``. In a multirun ``prompt='"a","b"'`` and
    ``prompt=choice("a", "b")`` stay sweeps.
    """
    multirun = is_multirun(argv) if multirun is None else multirun
    return [_quote(arg, multirun) for arg in argv]


def hints(argv: Sequence[str]) -> list[str]:
    """What to say of a command line that means something else than its words say: nothing of it is refused.

    A prompt that is the name of a file; texts of a multirun whose quotation marks the shell has eaten.
    """
    files = [value for word in argv if (value := word.removeprefix("prompt=")) != word and Path(value).suffix]
    found = [
        f"prompt={file} is drawn as text; for what is in the file write prompts={kind} prompts.path={file}"
        for file in files
        if (kind := reader_of(Path(file).suffix.lower())) and os.path.isfile(file)
    ]
    return found + (_lost_quotes(argv) if is_multirun(argv) else [])


def _lost_quotes(argv: Sequence[str]) -> list[str]:
    pairs = [(name.lstrip("+"), value) for name, _, value in (word.partition("=") for word in argv)]
    return [
        f"{name}={one_line(value, 60)} is one value, as it has no quotation marks here (a shell removes outer ones); "
        f"for a job of each write {name}='{','.join(hydra_quote(part.strip()) for part in value.split(','))}'"
        for name, value in pairs
        if name in free_texts() and _LOST_QUOTES.match(value) and not set("\"'()[]{}") & set(value)
    ]


def is_multirun(argv: Sequence[str]) -> bool:
    return any(arg in ("-m", "--multirun") or arg == "hydra.mode=MULTIRUN" for arg in argv)


def _quote(arg: str, multirun: bool) -> str:
    match = _ASSIGNMENT.fullmatch(arg)
    if match and match["key"] == "seeds" and re.fullmatch(r"\s*\{[^{}]*\}\s*", match["value"]):
        return f"seeds={hydra_quote(match['value'])}"  # OmegaConf cannot put a mapping where a list was
    if match and match["key"].lstrip("+") == "loras":
        return f"{match['key']}={_lora_lists(match['value'], multirun)}"
    if match and field_of(name := match["key"].lstrip("+")):
        key = f"++{name}" if _is_open(name) else match["key"]
        return f"{key}={quote_entries(name, match['value'], multirun, hydra_quote)}"
    if not match:
        return arg
    key, value = match["key"], match["value"]
    name = key.lstrip("+")
    if texts().get(name) == "text":
        refuse_missing_mark(name, value)
    if name in free_texts():
        if multirun and (choice := _QUOTED_CHOICE.fullmatch(value)):
            return f"{key}={choice[1]}"  # the same, and Hydra keeps the quotation marks of these
        keep = value == "null" or _QUOTED.fullmatch(value) or (multirun and _is_sweep(value))
        return arg if keep else f"{key}={hydra_quote(value)}"
    if texts().get(name) == "text" and _WITH_BRACKETS.fullmatch(value) and not _PLAIN_WORDS.fullmatch(value):
        return f"{key}={hydra_quote(value)}"
    is_one = multirun or "," not in value  # else Hydra tells how a text with a comma is written
    if texts().get(name) == "text" and is_one and _PLAIN_WORDS.fullmatch(value):
        return f"{key}={','.join(_text(part.strip()) for part in value.split(','))}"
    if _is_foreign(value):
        values = value.split(",") if multirun else [value]
        return f"{key}={','.join(hydra_quote(value.strip()) for value in values)}"
    return arg


def _text(word: str) -> str:
    """A word of a field that holds text: quoted where Hydra would read a number or a truth value."""
    return word if word in ("", "null") or _PLAIN.fullmatch(word) else hydra_quote(word)


def refuse_missing_mark(key: str, value: str) -> None:
    """Raise UserError for ``???``, which means "no value yet" in a config and cannot be a text."""
    if value.strip().strip("\"'").strip() == MISSING:
        raise UserError(f"{key}={value}: ??? alone stands for a value that is missing: write other words")


def _is_foreign(value: str) -> bool:
    """True for plain words with a sign that Hydra's grammar has not, such as a folder's Chinese name, or ``~/x``."""
    return (not value.isascii() or value.startswith("~/")) and _PLAIN_WORDS.fullmatch(value) is not None


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


def _is_sweep(value: str) -> bool:
    """A sweep the user spelled out: quoted strings with commas between them, or choice(...) / glob(...)."""
    quoted = r'(?:"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')'
    return re.fullmatch(rf"(?s)\s*{quoted}(?:\s*,\s*{quoted})+\s*|(?:choice|shuffle|sort)\(.*\)", value) is not None


def field_of(key: str) -> str | None:
    """The field of free-text entries that ``key`` sets, or None."""
    return next((field for field in EXAMPLES if key == field or key.startswith(f"{field}.")), None)


def quote_entries(key: str, value: str, multirun: bool, quote: Callable[[str], str]) -> str:
    """``value`` with its entries quoted by ``quote``. Raises UserError where it cannot be told what is an entry."""
    refusal = _Refusal(key, value)
    # Of a value typed over several lines: Hydra's grammar has line ends within quotes only.
    text = re.sub(r"[\r\n]+", " ", value.strip())
    if multirun and re.fullmatch(r"(?s)(?:choice|shuffle|sort|glob)\(.*\)", text):
        return value
    if multirun and len(values := _split(text, refusal)) > 1:
        return ",".join(_value(part, key, quote, refusal) for part in values)
    return _value(text, key, quote, refusal)


def _lora_lists(value: str, multirun: bool) -> str:
    """``[style.safetensors:0.8]``, or in a multirun several of them, as lists of {path, weight}."""
    refusal, text = _Refusal("loras", value), re.sub(r"[\r\n]+", " ", value.strip())
    if text in ("", "null") or text.startswith("${") or re.fullmatch(r"(?s)(?:choice|shuffle|sort|glob)\(.*\)", text):
        return value
    lists = _split(text, refusal)
    if len(lists) > 1 and not multirun:
        refusal("a list is needed")
    return ",".join(_lora_list(part, refusal) for part in lists)


def _lora_list(text: str, refusal: _Refusal) -> str:
    entries = _split(text[1:-1], refusal) if text.startswith("[") and text.endswith("]") else [text]
    return "[" + ",".join(_lora(entry, refusal) for entry in entries) + "]"


def _lora(text: str, refusal: _Refusal) -> str:
    if text.startswith("{") and text.endswith("}"):
        return "{" + ",".join(_pair(part, "loras", hydra_quote, refusal) for part in _split(text[1:-1], refusal)) + "}"
    quoted = _QUOTED.match(text)
    if quoted and quoted.end() < len(text) and not text[quoted.end() :].lstrip().startswith(":"):
        refusal(f"{text} is quoted in part only")
    plain = unquoted(quoted[0]) + text[quoted.end() :] if quoted else _ESCAPED.sub(r"\1", text)
    try:
        lora = parse_lora(plain, "loras")
    except UserError:
        refusal("an entry is empty")
    return f"{{path:{hydra_quote(lora.name)},weight:{lora.weight!r}}}"


class _Refusal:
    """One line that says what is wrong with this value and shows a form that works."""

    def __init__(self, key: str, value: str) -> None:
        self._given = f"{key}={value}" if len(value) <= 60 else f"{key}={value[:57]}..."
        self._example = f"{field_of(key)}={EXAMPLES[field_of(key) or '']}" if field_of(key) else LORAS_EXAMPLE

    def __call__(self, problem: str) -> NoReturn:
        raise UserError(f"{self._given}: {problem}: write {self._example}")


def _value(text: str, key: str, quote: Callable[[str], str], refusal: _Refusal) -> str:
    if text in ("", "null") or text.startswith("${") or _QUOTED.fullmatch(text):
        return text
    if text[0] in "[{":
        if text[-1] != _CLOSING[text[0]]:
            refusal(f"the {text[0]} is not closed by a {_CLOSING[text[0]]} at the end")
        parts = _split(text[1:-1], refusal)
        if text[0] == "[":
            return "[" + ",".join(_entry(part, key, quote, refusal) for part in parts) + "]"
        return "{" + ",".join(_pair(part, key, quote, refusal) for part in parts) + "}"
    if key in ("prompts.texts", "lora_dirs"):
        refusal("a list is needed")
    return _scalar(text, key, quote)


def _entry(text: str, key: str, quote: Callable[[str], str], refusal: _Refusal) -> str:
    """An entry of a list: always a text."""
    if not text:
        refusal("an entry is empty")
    refuse_missing_mark(key, text)
    if text[0] in "\"'" and not _QUOTED.fullmatch(text):
        refusal(f"{text} is quoted in part only")
    if text.startswith("[") and text.endswith("]"):
        refusal("a list within a list")
    return text if _QUOTED.fullmatch(text) else _scalar(text, key, quote)


def _pair(text: str, key: str, quote: Callable[[str], str], refusal: _Refusal) -> str:
    quoted = _QUOTED.match(text)
    name, colon, value = text.partition(":")
    if quoted and text[quoted.end() :].lstrip().startswith(":"):  # a mapping as JSON writes it
        name, colon, value = quoted[0][1:-1], ":", text[quoted.end() :].lstrip()[1:]
    if not colon:
        refusal(f"{text} has no name and colon before it")
    if not _KEY.fullmatch(name.strip()):
        refusal(f"the name {name.strip()} can be set in an experiment file only, here it is Latin letters and digits")
    return f"{name.strip()}:{_value(value.strip(), key, quote, refusal)}"


def _scalar(text: str, key: str, quote: Callable[[str], str]) -> str:
    is_interpolation = re.fullmatch(r"\$\{[^{}]*\}", text) is not None
    if is_interpolation or (key != "prompts.texts" and _PLAIN.fullmatch(text)):
        return text
    return quote(_ESCAPED.sub(r"\1", text))


def _split(text: str, refusal: _Refusal) -> list[str]:
    """The parts between the commas that are in no quotes and no brackets, blanks around them dropped."""
    parts, start, position, open_brackets = [], 0, 0, []
    while position < len(text):
        sign = text[position]
        if sign == "\\":
            position += 1
        elif sign in "\"'" and not _follows_text(text, position):
            quoted = _QUOTED.match(text, position)
            if quoted is None:
                refusal(f"the quotation mark before {text[position + 1 :][:20]} is not closed")
            position = quoted.end() - 1
        elif sign in _CLOSING:
            open_brackets.append(_CLOSING[sign])
        elif open_brackets and sign == open_brackets[-1]:
            open_brackets.pop()
        elif sign == "," and not open_brackets:
            parts.append(text[start:position].strip())
            start = position + 1
        position += 1
    if open_brackets:
        refusal(f"a bracket is open where {open_brackets[-1]} is missing")
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _follows_text(text: str, position: int) -> bool:
    """True for a quotation mark within words, such as the one of ``it's``: it opens nothing."""
    before = text[:position].rstrip()
    return bool(before) and before[-1] not in ",[{:("
