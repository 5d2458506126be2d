"""Training captions hold no held-out phrasing and no held-back combination."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from training.captions import COLORS, CaptionWriter, held_back, plural
from training.cases import load_cases
from training.lexicon import SLOT, colors, held_out, phrases, reserved, units
from training.names import Picture, build_names
from training.scenes import NATURAL, SceneWriter

REFERENCE = Path(__file__).parents[2] / "training" / "reference" / "pictures.json"


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Every picture's label in both languages; tags and short names are not in the repository."""
    named = json.loads(REFERENCE.read_text(encoding="utf-8"))
    groups = {"group": 3, "subgroup": "animal-mammal", "tags": [], "tags_zh": [], "shortcodes": [], "code": ""}
    return build_names([{**groups, **{k: n[k] for k in ("emoji", "label", "label_zh")}} for n in named])


@pytest.fixture(scope="module")
def drawn(pictures: list[Picture]) -> list[str]:
    writer = CaptionWriter(pictures, random.Random(0), fragments=0.3)
    scenes = SceneWriter(writer)
    singles = [writer.single(writer.rng.randrange(len(pictures)), long=k % 9 == 0) for k in range(12000)]
    return singles + [scenes.draw(long=k % 9 == 0)[1] for k in range(6000)]


NAMED = {"could you paint {np} for me", "{np} in the middle"}
"""The prototype's phrasings whose only words unknown to every list, "paint" and "middle", are parts of names."""


LISTS = ("en", "zh", "en_fresh", "zh_fresh", "en_unread", "zh_unread")


@pytest.mark.parametrize("language", LISTS)
def test_every_held_out_phrasing_has_a_word_of_its_own(language: str, pictures: list[Picture]) -> None:
    lists = phrases(language[:2])
    fields = ("determiners", "adjectives", "frames", "tails", "colored", "backdrops", "pairs", "twos", "categories")
    known = {unit for field in (*fields, "words") for text in getattr(lists, field) for unit in units(str(text))}
    names = {u for p in pictures for name in (*p.nouns, *p.nouns_zh) for u in units(name)}
    for template in held_out(language):
        own = units(SLOT.sub("|", template)) - known
        assert own, template
        assert own - names or template in NAMED, template


def test_drawn_captions_lack_a_word_of_every_held_out_phrasing(drawn: list[str]) -> None:
    seen = {unit for caption in drawn for unit in units(caption)}
    assert len(seen) > 4000
    for language in LISTS:
        for template in held_out(language):
            wanted = units(SLOT.sub("|", template))
            assert wanted - seen or template in NAMED, template


def test_held_back_combinations_are_not_drawn(pictures: list[Picture]) -> None:
    scenes = SceneWriter(CaptionWriter(pictures, random.Random(1)))
    coloured = [scenes.colored(False)[0] for _ in range(3000)]
    assert not [s for s in coloured if held_back(COLORS[s.tints[0]], pictures[s.things[0]].label)]
    pairs = [scenes.pair(False)[0] for _ in range(3000)]
    assert not [s for s in pairs if held_back(*(pictures[i].label for i in s.things))]
    tinted = [(pictures[i].label, t) for s in pairs for i, t in zip(s.things, s.tints) if t != NATURAL]
    assert tinted
    assert not [1 for label, tint in tinted if held_back(COLORS[tint], label)]


def test_one_in_ten_combinations_is_held_back(pictures: list[Picture]) -> None:
    share = [held_back(colour, p.label) for colour in COLORS for p in pictures]
    assert 0.08 < sum(share) / len(share) < 0.12


def test_a_caption_names_its_picture(pictures: list[Picture]) -> None:
    writer = CaptionWriter(pictures, random.Random(2))
    for index in random.Random(3).sample(range(len(pictures)), 300):
        caption = writer.single(index, zh=False).lower()
        names = {n for name, _ in pictures[index].weighted for n in (name, plural(name))}
        assert any(name in caption for name in names), (caption, pictures[index].label)


def test_a_colour_caption_names_its_colour(pictures: list[Picture]) -> None:
    scenes = SceneWriter(CaptionWriter(pictures, random.Random(4)))
    for _ in range(300):
        scene, caption = scenes.colored(False)
        name = COLORS[scene.tints[0]]
        assert name in caption.lower() or colors()[name]["zh"] in caption


def test_fragments_are_pieces_of_names_and_no_names(pictures: list[Picture]) -> None:
    writer = CaptionWriter(pictures, random.Random(5))
    names = {n.lower() for p in pictures for n, _ in (*p.weighted, *p.weighted_zh)}
    english, chinese = ([writer.fragment(zh) for _ in range(2000)] for zh in (False, True))
    assert not (names | {plural(n) for n in names}) & {*english, *chinese}
    assert not [word for word in (*english, *chinese) if units(word) & reserved()]
    whole = {word for name in names for word in name.split()}
    assert 0.1 < sum(word in whole for word in english) / 2000 < 0.4
    assert all(c in "".join(names) for word in chinese for c in word)
    ends = {name[-4:] for name in whole if len(name) > 3}
    starts = {name[:4] for name in whole if len(name) > 3}
    assert sum(word not in whole and word[-4:] in ends and word[:4] not in starts for word in english) / 2000 > 0.05
    assert sum(word not in whole and word[:4] in starts for word in english) / 2000 > 0.1


def test_captions_without_a_name_show_favourites(pictures: list[Picture]) -> None:
    scenes = SceneWriter(CaptionWriter(pictures, random.Random(6)))
    drawn = [scenes.nameless(long=k % 5 == 0) for k in range(400)]
    assert {scene.things[0] for scene, _ in drawn} == set(scenes.writer.favourites)
    assert 0.3 < sum(text == "" for _, text in drawn) / 400 < 0.5
    assert len(scenes.writer.favourites) < 20


def test_the_unread_phrasings_have_cases_of_their_own() -> None:
    cases = load_cases(REFERENCE.parent)
    for language in ("en", "zh"):
        templates = held_out(f"{language}_unread")
        assert len(templates) >= 15
        assert not set(templates) & {t for name in LISTS if "unread" not in name for t in held_out(name)}
        for name in (f"{language}_unread", f"{language}_unread_alias"):
            chosen = [c for c in cases if c.set == name]
            assert len(chosen) > 100
            assert {c.phrasing for c in chosen} == set(range(len(templates)))
            assert all(c.templates == templates and c.right[0] for c in chosen)
