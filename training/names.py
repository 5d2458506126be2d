"""Which words name which picture, and how often training uses each."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.lexicon import CHINESE, colors, phrases, read_yaml

COLOR_WORDS = {*colors(), "grey", "golden", "dark", "light"}
COLOR_CHARS = "".join(c["zh"] for c in colors().values()) + "彩青金"
FLAT_GROUPS = {0, 3, 4, 5, 6, 7}  # faces, nature, food, travel, activities, objects: these take a colour
UNFLIPPABLE_SUBGROUPS = {
    "time",
    "money",
    "book-paper",
    "mail",
    "office",
    "music",
    "transport-sign",
    "game",
    "zodiac",
    "arrow",
}
UNFLIPPABLE_WORDS = re.compile(
    r"\b(left|right|sign|post office|bank|hotel|hospital|store|ATM|stop|police|school|love|Tokyo|calendar|chart|clock"
    r"|watch|teller|lock(ed)?|musical|ticket|joystick|video game|slot|Statue|map|globe|Japan)\b", re.IGNORECASE
)  # fmt: skip


@dataclass(slots=True)
class Picture:
    """One picture's names. Weighted names are (name, weight) pairs; the others are plain nouns used in scenes."""

    index: int
    code: str
    emoji: str
    group: int
    subgroup: str
    label: str
    label_zh: str
    aliases: list[str]
    aliases_zh: list[str]
    weighted: list[tuple[str, float]] = field(default_factory=list)
    weighted_zh: list[tuple[str, float]] = field(default_factory=list)
    nouns: list[str] = field(default_factory=list)
    nouns_zh: list[str] = field(default_factory=list)

    @property
    def popular(self) -> bool:
        """Listed in aliases.yaml: drawn more often and used in pairs."""
        return bool(self.aliases or self.aliases_zh)

    @property
    def flippable(self) -> bool:
        """Whether the mirrored picture still shows the same thing."""
        return (
            self.group in FLAT_GROUPS | {1}
            and not self.subgroup.startswith("hand")
            and self.subgroup not in UNFLIPPABLE_SUBGROUPS
            and not UNFLIPPABLE_WORDS.search(self.label)
        )

    @property
    def colorable(self) -> bool:
        """Whether "a red <noun>" makes sense."""
        return self.group in FLAT_GROUPS and bool(self.plain_nouns)

    @property
    def plain_nouns(self) -> list[str]:
        """English nouns that name no colour."""
        return [n for n in self.nouns if not set(n.split()) & COLOR_WORDS]

    @property
    def plain_nouns_zh(self) -> list[str]:
        """Chinese nouns that name no colour."""
        return [n for n in self.nouns_zh if not set(n) & set(COLOR_CHARS)]

    @property
    def weight(self) -> float:
        """How often training draws this picture."""
        by_group = {0: 1.0, 1: 0.7, 3: 1.2, 4: 1.2, 5: 0.8, 6: 1.0, 7: 0.9, 8: 0.5, 9: 0.6}
        return by_group[self.group] * (1.6 if self.popular else 1.0)


def clean_label(label: str) -> str:
    """CLDR label as people type it."""
    return label.lower().replace("’", "'").replace("“", "").replace("”", "").replace(":", "")


def is_chinese(text: str) -> bool:
    """Whether the text holds a Han character."""
    return bool(CHINESE.search(text))


def load_pictures(packed: Path, limit: int | None = None) -> list[Picture]:
    """Names of all packed pictures (or `limit` of them, evenly spread), from `pictures.json` and `aliases.yaml`."""
    entries = json.loads((packed / "pictures.json").read_text(encoding="utf-8"))
    return build_names([entries[i] for i in spread(len(entries), limit)])


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` indices evenly spread over `range(count)`; all of them without a limit."""
    return [i * count // limit for i in range(limit)] if limit else list(range(count))


def build_names(entries: list[dict[str, Any]]) -> list[Picture]:
    """Resolve names that several pictures claim: a label or alias is its owner's alone, shared tags weigh less."""
    aliases = read_yaml("aliases.yaml")
    pictures = [
        Picture(
            index=i, code=e["code"], emoji=e["emoji"], group=e["group"], subgroup=e["subgroup"],
            label=clean_label(e["label"]), label_zh=e["label_zh"],
            aliases=aliases.get(e["label"], {}).get("en", []), aliases_zh=aliases.get(e["label"], {}).get("zh", []),
        ) for i, e in enumerate(entries)
    ]  # fmt: skip
    owner = {n: p.index for p in pictures for n in (p.label, p.label_zh)}
    owner |= {a: p.index for p in pictures for a in (*p.aliases, *p.aliases_zh)}
    claims = Counter(t for e in entries for t in {*e["tags"], *e["tags_zh"], *e["shortcodes"]})
    vague = {*phrases("en").adjectives, *phrases("zh").adjectives, *COLOR_WORDS}
    for picture, entry in zip(pictures, entries):
        fill(picture, entry, owner, claims, vague)
    return pictures


def fill(p: Picture, entry: dict[str, Any], owner: dict[str, int], claims: Counter[str], vague: set[str]) -> None:
    """Weighted names and plain nouns of one picture."""

    def mine(name: str) -> bool:
        return owner.get(name, p.index) == p.index and name not in vague

    p.weighted = [(p.label, 4.0 if p.aliases else 6.0)] + [(a, 5.0 / len(p.aliases) ** 0.5) for a in p.aliases]
    p.weighted += [(s, 1.5 / claims[s]) for s in entry["shortcodes"] if s != p.label and mine(s)]
    tags = [(t, t.lower()) for t in entry["tags"] if claims[t] <= 5]
    p.weighted += [(low, 1.0 / claims[t]) for t, low in tags if len(low) > 1 and mine(low) and low != p.label]
    if p.label_zh and mine(p.label_zh):
        p.weighted_zh.append((p.label_zh, 3.0 if p.aliases_zh else 5.0))
    p.weighted_zh += [(a, 5.0 / len(p.aliases_zh) ** 0.5) for a in p.aliases_zh]
    p.weighted_zh += [(t, 0.8 / claims[t]) for t in entry["tags_zh"] if claims[t] <= 4 and mine(t) and t != p.label_zh]
    p.weighted_zh = p.weighted_zh or [(p.label_zh or p.label, 1.0)]
    p.nouns = [p.label, *p.aliases]
    p.nouns_zh = [*p.aliases_zh, p.label_zh] if p.label_zh else (p.aliases_zh or [p.label])
    stripped = " ".join(w for w in p.label.split() if w not in COLOR_WORDS)
    if stripped and stripped != p.label:
        p.nouns.append(stripped)


def sharing(pictures: list[Picture], name: str) -> list[int]:
    """Every picture that has `name` as a label, an alias or a tag in use."""
    return [p.index for p in pictures if any(name == n for n, _ in (*p.weighted, *p.weighted_zh))]
