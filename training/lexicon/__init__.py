"""The committed word lists and phrasings, and small helpers to read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")


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
def held_out(language: str) -> list[str]:
    """Held-out phrasings of `en` or `zh`."""
    return read_yaml("heldout.yaml")[language]
