"""The committed word lists and phrasings, and small helpers to read them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")
HAN_RUN = re.compile("[\u4e00-\u9fff]+")
SLOT = re.compile(r"\{np?\}")


@dataclass(frozen=True, slots=True)
class Phrases:
    """Phrasings of one language; see `phrases.yaml` for the slots."""

    determiners: list[str]
    adjectives: list[str]
    frames: list[str]
    tails: list[str]
    colored: list[str]
    backdrops: list[str]
    pairs: list[str]
    twos: list[str]
    categories: list[str]
    words: list[str]


def read_yaml(name: str) -> Any:
    """One YAML file of this folder."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def read_words(name: str) -> list[str]:
    """A word list: whitespace-separated, lines starting with # are comments."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


@cache
def phrases(language: str) -> Phrases:
    """Phrasings of `en` or `zh`."""
    return Phrases(**read_yaml("phrases.yaml")[language], words=read_words(f"words_{language}.txt"))


@cache
def colors() -> dict[str, dict[str, Any]]:
    """English colour name -> {zh, rgb in [0, 1]}."""
    return read_yaml("phrases.yaml")["colors"]


@cache
def reserved() -> frozenset[str]:
    """Units (see `units`) of held-out phrasings that no phrasing or word list of training holds."""
    known: set[str] = set()
    for language in ("en", "zh"):
        lists = phrases(language)
        known |= {u for field in fields(lists) for text in getattr(lists, field.name) for u in units(str(text))}
    templates = [t for key in read_yaml("heldout.yaml") for t in held_out(key)]
    return frozenset(u for t in templates for u in units(SLOT.sub("|", t))) - known


def units(text: str) -> set[str]:
    """English words, and Chinese two-character sequences."""
    pairs = {run[i : i + 2] for run in HAN_RUN.findall(text) for i in range(len(run) - 1)}
    return pairs | set(re.findall(r"[a-z]+", text.lower()))


@cache
def held_out(language: str) -> list[str]:
    """Held-out phrasings of `en` or `zh`, or the later ones of `en_fresh` or `zh_fresh`."""
    return read_yaml("heldout.yaml")[language]
