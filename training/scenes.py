"""Random scenes beyond one picture on white: colours, backdrops, pairs, categories, and captions without any name."""

from __future__ import annotations

from training.captions import COLORS, CaptionWriter, Scene, held_back, plural
from training.lexicon import colors, phrases

NATURAL = -1
SHARES = {"colored": 0.28, "backdrop": 0.12, "pair": 0.44, "two": 0.04, "category": 0.05, "nameless": 0.07}


class SceneWriter:
    """Draws scenes and captions for them from the writer's random stream."""

    def __init__(self, writer: CaptionWriter) -> None:
        self.writer = writer
        self.taken = {n for p in writer.pictures for n, _ in (*p.weighted, *p.weighted_zh)}

    def draw(self, long: bool = False) -> tuple[Scene, str]:
        """One scene and one caption."""
        kind = self.writer.rng.choices(list(SHARES), list(SHARES.values()))[0]
        while True:
            scene, caption = getattr(self, kind)(long)
            if self.writer.is_clean(caption):
                return scene, caption

    def thing(self, index: int, tint: int, zh: bool) -> tuple[str, str]:
        """(bare noun, noun phrase) of a picture in a tint."""
        w, p = self.writer, self.writer.pictures[index]
        if tint == NATURAL:
            noun = w.rng.choice(p.nouns_zh if zh else p.nouns)
            return noun, w.noun_phrase(noun, zh, adjectives=0.1)
        noun = w.rng.choice(p.plain_nouns_zh if zh else p.plain_nouns)
        name = colors()[COLORS[tint]]["zh"] if zh else COLORS[tint]
        frame = w.rng.choice(phrases("zh" if zh else "en").colored)
        text = w._fill(frame, zh, c=name, n=noun)
        return text, w.noun_phrase(text, zh, adjectives=0.1)

    def tintable(self, index: int, tint: int) -> bool:
        """Whether training may show this picture in this colour: not held back, and not another picture's name."""
        p = self.writer.pictures[index]
        clash = any(f"{COLORS[tint]} {n}" in self.taken for n in p.plain_nouns)
        return p.colorable and bool(p.plain_nouns_zh) and not clash and not held_back(COLORS[tint], p.label)

    def _tinted(self) -> tuple[int, int]:
        rng = self.writer.rng
        while True:
            pool = self.writer.popular if rng.random() < 0.4 else self.writer.colorable
            index, tint = rng.choice(pool), rng.randrange(len(COLORS))
            if self.tintable(index, tint):
                return index, tint

    def colored(self, long: bool) -> tuple[Scene, str]:
        """One picture in an unusual colour."""
        index, tint = self._tinted()
        zh = self.writer.language()
        bare, phrase = self.thing(index, tint, zh)
        return Scene((index,), (tint,)), self.writer.wrap(bare, phrase, zh, long)

    def backdrop(self, long: bool) -> tuple[Scene, str]:
        """One picture on a coloured background."""
        w = self.writer
        index, back, zh = w.rng.randrange(len(w.pictures)), w.rng.randrange(len(COLORS)), w.language()
        p = phrases("zh" if zh else "en")
        tails = [t for t in p.tails if not any(word in t for word in ("background", "背景", "white", "白", "isolated"))]
        _, phrase = self.thing(index, NATURAL, zh)
        name = colors()[COLORS[back]]["zh"] if zh else COLORS[back]
        text = w._fill(w.rng.choice(p.backdrops), zh, np=phrase, c=name)
        return Scene((index,), (NATURAL,), back), w.wrap(text, text, zh, long, tails)

    def pair(self, long: bool) -> tuple[Scene, str]:
        """Two popular things side by side; one in ten combinations is never shown in training."""
        w, zh = self.writer, self.writer.language()
        while True:
            left, right = w.rng.choice(w.popular), w.rng.choice(w.popular)
            if not held_back(w.pictures[left].label, w.pictures[right].label):
                break
        tints = tuple(self._pair_tint(i) for i in (left, right))
        (_, a), (_, b) = self.thing(left, tints[0], zh), self.thing(right, tints[1], zh)
        text = w._fill(w.rng.choice(phrases("zh" if zh else "en").pairs), zh, a=a, b=b)
        return Scene((left, right), tints), w.wrap(text, text, zh, long)

    def _pair_tint(self, index: int) -> int:
        rng = self.writer.rng
        tint = rng.randrange(len(COLORS))
        return tint if rng.random() < 0.12 and self.tintable(index, tint) else NATURAL

    def two(self, long: bool) -> tuple[Scene, str]:
        """The same thing twice."""
        w, zh = self.writer, self.writer.language()
        index = w.rng.choice(w.popular)
        noun = w.rng.choice(w.pictures[index].nouns_zh if zh else w.pictures[index].nouns)
        text = w._fill(w.rng.choice(phrases("zh" if zh else "en").twos), zh, n=noun, ns=plural(noun))
        return Scene((index, index), (NATURAL, NATURAL)), w.wrap(text, text, zh, long)

    def category(self, long: bool) -> tuple[Scene, str]:
        """Any picture of a kind."""
        w, zh = self.writer, self.writer.language()
        words, members = w.rng.choice(w.categories)
        noun = w.rng.choice(words["zh" if zh else "en"])
        text = w._fill(
            w.rng.choice(phrases("zh" if zh else "en").categories), zh, np=w.noun_phrase(noun, zh, 0.1), n=noun
        )
        return Scene((w.rng.choice(members),), (NATURAL,)), w.wrap(noun, text, zh, long)

    def nameless(self, long: bool) -> tuple[Scene, str]:
        """Nothing, or only filler words: one of a few favourites, so that what is drawn is a thing and no mixture."""
        w, zh = self.writer, self.writer.language()
        text = "" if w.rng.random() < 0.5 and not long else w.words(zh, 1, 30 if long else 8)
        return Scene((w.rng.choice(w.favourites),), (NATURAL,)), text
