"""Random captions: phrasings around names, with filler and unknown words mixed in."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from training.lexicon import CHINESE, Phrases, colors, phrases, read_yaml, reserved, units
from training.names import Picture

COLORS = list(colors())
ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl pr sh st th tr"
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ou")
SYLLABLES = [onset + vowel for onset in ONSETS.split(" ") for vowel in VOWELS]
ENDINGS = [
    "",
    "",
    "n",
    "r",
    "s",
    "t",
    "l",
    "ng",
    "nd",
    "st",
    "ck",
    "ble",
    "tion",
    "ing",
    "ed",
    "ly",
    "er",
    "ous",
    "ish",
]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption shows. Colours and the backdrop index `COLORS`; -1 is natural colour or white.

    `things` holds one or two picture indices; two stand left and right.
    """

    things: tuple[int, ...]
    tints: tuple[int, ...]
    backdrop: int = -1


def held_back(*parts: str) -> bool:
    """Whether a combination (colour and label, or two labels) is kept out of training: one in ten, by its checksum."""
    return zlib.crc32("|".join(parts).encode()) % 10 == 0


def plural(noun: str) -> str:
    """English plural by rule."""
    if re.search(r"(s|sh|ch|x)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(article: str, noun: str) -> str:
    """`a` becomes `an` before a vowel."""
    if article == "a" and noun[:1] in "aeiou":
        article = "an"
    return f"{article} {noun}"


class CaptionWriter:
    """Draws captions from one random stream.

    `noisy` is the share of captions that get random filler: common words, invented words, odd punctuation; `fragments`
    the share of filler words made of pieces of names, which teaches that a piece of a name does not name the picture.
    """

    def __init__(
        self, pictures: list[Picture], rng: random.Random, noisy: float = 0.45, fragments: float = 0.0
    ) -> None:
        self.pictures, self.rng, self.noisy, self.fragments = pictures, rng, noisy, fragments
        self.names = {n.lower() for p in pictures for n, _ in (*p.weighted, *p.weighted_zh)}
        self.naming = self.names | {plural(n) for n in self.names if n.isascii()}
        self.reserved = reserved() - {u for n in self.names for u in units(n)}
        self.pieces = sorted({w for n in self.names for w in n.split() if w.isascii() and w.isalpha() and len(w) > 2})
        self.characters = sorted({c for n in self.names for c in n if CHINESE.match(c)})
        self.popular = [p.index for p in pictures if p.popular and p.group != 8] or [p.index for p in pictures]
        self.colorable = [p.index for p in pictures if p.colorable]
        spec = read_yaml("phrases.yaml")
        self.favourites = [p.index for p in pictures if p.label in spec["favourites"]] or self.popular
        self.categories = [
            (words, members) for key, words in spec["categories"].items() if (members := self._members(key))
        ]

    def _members(self, key: str) -> list[int]:
        start = key.rstrip("*")
        return [p.index for p in self.pictures if (p.subgroup.startswith(start) if "*" in key else p.subgroup == key)]

    # words ------------------------------------------------------------------------------------------------------

    def word(self, zh: bool) -> str:
        """A filler word: common, or (one in four) invented, in Chinese one in eight English."""
        rng = self.rng
        if zh and rng.random() < 0.12:
            zh = False
        if rng.random() < self.fragments:
            return self.fragment(zh)
        if not zh and rng.random() < 0.28:
            return "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))) + rng.choice(ENDINGS)
        if zh and rng.random() < 0.15:
            return "".join(rng.choice(rng.choice(phrases("zh").words)) for _ in range(rng.choice((1, 2, 2, 3))))
        return rng.choice(phrases("zh" if zh else "en").words)

    def fragment(self, zh: bool) -> str:
        """A filler word made of pieces of names: "volume", "crabtion", "broaship".

        It is no name, no name's plural and not held out. A token has an id for each place in a word, and each must be
        met in words that name nothing.
        """
        while True:
            word = self._chinese_fragment() if zh else self._english_fragment()
            if word not in self.naming and not units(word) & reserved():
                return word

    def _chinese_fragment(self) -> str:
        return "".join(self.rng.choice(self.characters) for _ in range(self.rng.choice((1, 2, 2, 2, 3))))

    def _english_fragment(self) -> str:
        """A word of a name; or its start before an ending; or its end, or a part, or all of it, inside another word."""
        rng = self.rng
        kind, piece = rng.random(), rng.choice(self.pieces)
        if kind < 0.22:
            return piece
        if kind < 0.5:
            start = rng.choice((0, 0, 0, max(0, len(piece) - 4)))
            return piece[start : start + rng.randint(2, 8)] + rng.choice((*ENDINGS, *SYLLABLES))
        other = rng.choice(self.pieces)[: rng.randint(2, 6)]
        head = rng.choice(("".join(rng.choices(SYLLABLES, k=rng.choice((1, 1, 2)))), other))
        first = rng.choice((0, 0, rng.randrange(len(piece)), max(0, len(piece) - rng.randint(2, 6))))
        length = rng.choice((len(piece), len(piece), rng.randint(2, 6)))
        return head + piece[first : first + length] + (rng.choice(ENDINGS) if rng.random() < 0.3 else "")

    def is_clean(self, caption: str) -> bool:
        """Whether a caption holds no held-out word outside names."""
        return not units(caption) & self.reserved

    def words(self, zh: bool, low: int, high: int) -> str:
        """`low` to `high` filler words."""
        picked = [self.word(zh) for _ in range(self.rng.randint(low, high))]
        return ("" if zh else " ").join(picked)

    def _fill(self, text: str, zh: bool, **slots: str) -> str:
        for key, value in slots.items():
            text = text.replace("{" + key + "}", value)
        while "{w}" in text:
            text = text.replace("{w}", self.word(zh), 1)
        return text

    def noun_phrase(self, noun: str, zh: bool, adjectives: float = 0.25) -> str:
        """The noun, mostly with a determiner and sometimes with an adjective."""
        rng, p = self.rng, phrases("zh" if zh else "en")
        if rng.random() < adjectives:
            adjective = self.word(zh) + ("的" if zh else "") if rng.random() < self.noisy else rng.choice(p.adjectives)
            noun = adjective + ("" if zh else " ") + noun
        if zh:
            return ("" if noun.startswith("一") else rng.choice(p.determiners)) + noun
        return with_article(rng.choice(p.determiners), noun) if rng.random() < 0.78 else noun

    # sentences --------------------------------------------------------------------------------------------------

    def wrap(self, bare: str, phrase: str, zh: bool, long: bool = False, tails: list[str] | None = None) -> str:
        """Put a noun (`bare`) or noun phrase into a sentence, with tails and noise. `long` asks for many tails."""
        rng, p = self.rng, phrases("zh" if zh else "en")
        plain = [f for f in p.frames if "{w}" not in f]
        noisy = rng.random() < self.noisy
        text = phrase
        if rng.random() < (0.75 if noisy else 0.6):
            frame = rng.choice(p.frames if noisy else plain)
            text = self._fill(frame, zh, np=phrase, n=bare)
        space = "" if zh else " "
        if noisy and rng.random() < 0.45:
            before, after = rng.choice(((1, 0), (0, 1), (1, 1)))
            count = 6 if long else 4
            text = space.join(
                filter(
                    None, (self.words(zh, 1, count) if before else "", text, self.words(zh, 1, count) if after else "")
                )
            )
        return self._tails(text, zh, p, long, noisy, tails)

    def _tails(self, text: str, zh: bool, p: Phrases, long: bool, noisy: bool, tails: list[str] | None) -> str:
        rng, choices = self.rng, tails or p.tails
        count = rng.randint(4, 20) if long else (rng.random() < 0.3) + (rng.random() < 0.1)
        for _ in range(count):
            tail = rng.choice([t for t in choices if noisy or "{w}" not in t])
            text += rng.choice(("，", "，", ",") if zh else (", ", ", ", ". ", " ", "; ")) + self._fill(tail, zh)
        if rng.random() < 0.12:
            text += rng.choice("。！？…" if zh else ".!?")
        return text[:1].upper() + text[1:] if rng.random() < 0.15 else text

    def language(self) -> bool:
        """True for Chinese: a little over a third of the captions."""
        return self.rng.random() < 0.37

    def single(self, index: int, long: bool = False, zh: bool | None = None) -> str:
        """A caption of one picture on white."""
        while not self.is_clean(caption := self._single(index, long, zh)):
            pass
        return caption

    def _single(self, index: int, long: bool, zh: bool | None) -> str:
        picture, rng = self.pictures[index], self.rng
        zh = self.language() if zh is None else zh
        names = picture.weighted_zh if zh else picture.weighted
        name = rng.choices([n for n, _ in names], [w for _, w in names])[0]
        if not zh and picture.group in (3, 4, 5, 6, 7) and rng.random() < 0.04:
            name = plural(name)
        return self.wrap(name, self.noun_phrase(name, zh), zh, long)
