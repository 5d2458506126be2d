"""Fonts for labels: one of the machine's that has the glyphs, whatever the script. Nothing is installed or bundled."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

log = logging.getLogger(__name__)

FONT_SIZE = 14
FONT_DIRS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/System/Library/Fonts",
    "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
CJK_FONTS = (
    "NotoSansCJK*", "NotoSansSC*", "SourceHanSans*", "wqy-*", "DroidSansFallback*", "PingFang*", "STHeiti*", "msyh*",
    "simhei*", "simsun*",
)  # fmt: skip
ASKED = 64
"""Characters that fontconfig is asked for at once."""
TRIED = 20
"""Fonts of one answer that are looked into, plain ones without serifs first."""
MISSING = "\U000fffff"
"""For private use: what a font draws for it, it draws for every character that it has not."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def default_font() -> Font:
    """Pillow's own, which has Latin letters."""
    return ImageFont.load_default(FONT_SIZE)


def is_latin(text: str) -> bool:
    return all(c < "\u0180" for c in text)


def font_for(texts: Iterable[str]) -> Font:
    """A font that can show all of ``texts``, or failing that the one that can show most of what is not Latin."""
    foreign = frozenset(c for text in texts for c in text if not is_latin(c) and c.isprintable())
    return _font_with(foreign) if foreign else default_font()


@functools.lru_cache(maxsize=65536)
def can_show(font: Font, character: str) -> bool:
    """True if the font has a picture of its own for the character: not the box that stands for all it lacks."""
    return is_latin(character) or (character.isprintable() and _glyph(font, character) != _glyph(font, MISSING))


def _glyph(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask: Any = font.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=64)
def _font_with(characters: frozenset[str]) -> Font:
    best, most = default_font(), 0
    for path in dict.fromkeys(itertools.chain(_usual_fonts(), _fonts_of_fontconfig(characters))):
        try:
            font = ImageFont.truetype(path, FONT_SIZE)
        except OSError:
            continue
        shown = sum(can_show(font, character) for character in characters)
        if shown == len(characters):
            return font
        if shown > most:
            best, most = font, shown
    return best


@functools.cache
def _usual_fonts() -> tuple[str, ...]:
    found = []
    for folder, pattern in itertools.product(FONT_DIRS, CJK_FONTS):
        found += sorted(map(str, Path(os.path.expanduser(folder)).glob(f"**/{pattern}.[to]t[fc]")))
    return tuple(found)


def _fonts_of_fontconfig(characters: frozenset[str]) -> Iterator[str]:
    """Files of installed fonts that have all of ``characters``, then those with the first one; none without it."""
    asked = sorted(characters)[:ASKED]
    for wanted in (asked, asked[:1]):
        command = ["fc-list", ":charset=" + " ".join(f"{ord(c):x}" for c in wanted), "--format=%{file}\n"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, encoding="utf-8")
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            log.debug("fontconfig cannot be asked: %s", error)
            return
        files = [line for line in answer.stdout.splitlines() if line]
        yield from sorted(files, key=lambda file: ("Sans" not in file, len(file), file))[:TRIED]
