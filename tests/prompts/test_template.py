"""Blanks, variants and wildcards."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.prompt_inputs import refusal, texts
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.template import Combine, Template, _nth

FILL = {"subject": ["cat", "一只狗"], "style": ["oil", "ink", "3d"]}


def test_without_a_template_braces_are_text():
    assert texts("{subject} {a|b} __w__ $5 # 100%") == ["{subject} {a|b} __w__ $5 # 100%"]


def test_product_uses_only_the_blanks_of_each_text():
    assert texts(["a {subject}, {style}", "a {style} pot", "plain"], fill=FILL) == [
        *(f"a {s}, {t}" for s, t in itertools.product(*FILL.values())),
        *(f"a {t} pot" for t in FILL["style"]),
        "plain",
    ]


def test_zip_and_repeats():
    fill = {"a": [1, 2], "b": ["x", "y"]}
    assert texts("{a}{b}{a}", fill=fill, combine=Combine.zip) == ["1x1", "2y2"]


def test_braces_can_be_written():
    assert texts("{{subject}} {subject} {}", fill={"subject": ["cat"]}) == ["{subject} cat {}"]


def test_values_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("# styles\noil\n\nink\n", encoding="utf-8")
    assert texts("{style}", fill={"style": str(tmp_path / "s.txt")}) == ["oil", "ink"]


def test_random_depends_on_seed_and_text_alone():
    def draw(*extra, seed=0):
        return texts([*extra, "a {subject}, {style}"], fill=FILL, combine=Combine.random, count=3, seed=seed)[-3:]

    assert len(set(draw())) == 3
    assert draw() == draw("another {style}")
    assert any(draw() != draw(seed=s) for s in range(1, 4))


def test_random_from_astronomically_many():
    fill = {name: list(range(1000)) for name in "abcdefgh"}
    assert len(set(texts("".join(f"{{{n}}}" for n in fill), fill=fill, combine=Combine.random, count=5))) == 5


@given(st.lists(st.lists(st.text(max_size=2), min_size=1, max_size=4), min_size=1, max_size=4))
def test_nth_counts_like_product(lists):
    combinations = list(itertools.product(*lists))
    assert [_nth(lists, n) for n in range(len(combinations))] == combinations


def test_expansion_is_recorded():
    source = Inline(texts=["a {subject}"], template=Template(fill=FILL), limit=2)
    prompts = read_prompts(source)
    assert prompts[1].metadata == {"template": "a {subject}", "values": {"subject": "一只狗"}}


def test_ids_stay_unique(tmp_path):
    from zimage_runner.prompts.jsonl import Jsonl

    (tmp_path / "p.jsonl").write_text(
        '{"text": "a {subject}", "id": "x"}\n{"text": "b", "id": "y"}\n', encoding="utf-8"
    )
    prompts = read_prompts(Jsonl(path=str(tmp_path / "p.jsonl"), template=Template(fill=FILL)))
    assert [p.id for p in prompts] == ["x-1", "x-2", "y"]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("{subjct}", {"fill": FILL}, "prompts.texts[0]: nothing fills {subjct}: did you mean {subject}?"),
        ("{zzz}", {"fill": FILL}, "add prompts.template.fill.zzz=[...]"),
        (
            "{subject}{style}",
            {"fill": FILL, "combine": Combine.zip},
            "lists of one length; values: {subject} 2, {style} 3",
        ),
        ("{a}", {"fill": {"a": []}}, "prompts.template.fill.a=[]: give a list"),
        ("{a}", {"fill": {"a": 5}}, "prompts.template.fill.a=5: give a list"),
        ("{a}", {"fill": {"a": ["x", "x"]}}, "prompts.template.fill.a holds 'x' twice"),
        ("{a}", {"fill": {"a": "/nowhere.txt"}}, "/nowhere.txt does not exist"),
        ("{a}", {"fill": FILL, "count": 0}, "prompts.template.count=0 is out of range"),
        ("a", {"count": 3}, "prompts.template.count=3 has no effect with prompts.template.combine=product: add"),
        ("a", {"seed": 3, "combine": Combine.zip}, "template.seed=3 has no effect with prompts.template.combine=zip"),
        ("a", {"wildcards": "/tmp"}, "prompts.template.wildcards is set, but prompts.template.dynamic is false"),
        ("{a}{b}", {"fill": {"a": list(range(2000)), "b": list(range(2000))}}, "4,000,000 combinations"),
    ],
)
def test_bad_templates(text, options, expected):
    assert expected in refusal(text, **options)


class TestDynamic:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("dynamicprompts")

    def test_variants(self):
        assert texts("a {red|蓝色|} {cat|dog}", dynamic=True) == [
            "a red cat", "a red dog", "a 蓝色 cat", "a 蓝色 dog", "a cat", "a dog",
        ]  # fmt: skip
        assert texts("{2$$ and $$a|b|c}", dynamic=True)[:2] == ["a and b", "a and c"]

    def test_wildcards(self, tmp_path):
        (tmp_path / "animal.txt").write_text("cat\ndog\n", encoding="utf-8")
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "colour.txt").write_text("red {wine|brick}\n", encoding="utf-8")
        made = texts("a __deep/colour__ __animal__", dynamic=True, wildcards=str(tmp_path))
        assert made == ["a red wine cat", "a red wine dog", "a red brick cat", "a red brick dog"]

    def test_blanks_are_filled_first(self):
        assert texts("{who} is {happy|sad}", fill={"who": ["Ann"]}, dynamic=True) == ["Ann is happy", "Ann is sad"]

    def test_random_is_deterministic(self):
        def draw(*extra):
            options = {"dynamic": True, "combine": Combine.random, "count": 4, "seed": 1}
            return texts([*extra, "{a|b|c|d} {e|f|g|h}"], **options)

        assert draw() == draw("other {x|y}")[-len(draw()) :]
        assert len(draw()) == len(set(draw())) >= 2

    def test_plain_text_passes(self):
        assert texts("a cat (8k), [x] a_b", dynamic=True) == ["a cat (8k), [x] a_b"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a __nope__", "prompts.texts[0]: nothing fills __nope__: set prompts.template.wildcards"),
            ("a {b", "prompts.texts[0]: cannot read the variants"),
            ("costs $5", "prompts.texts[0]: cannot read the variants"),
            ("{" * 2000 + "a" + "}" * 2000, "prompts.texts[0]: the variants are nested too deeply"),
            ("# comment", "prompts.texts[0]: the variants come out empty"),
        ],
    )
    def test_bad_variants(self, text, expected):
        assert expected in refusal(text, dynamic=True)

    def test_wildcards_stay_in_their_directory(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "secret.txt").write_text("secret\n", encoding="utf-8")
        assert "__" in refusal("a __../secret__", dynamic=True, wildcards=str(tmp_path / "in"))


@pytest.mark.parametrize("variants", ["{red|blue}", "{|big}", "__animals__", "__deep/colour__"])
def test_variants_that_are_not_asked_for_are_told_of_once(variants, caplog):
    given = ["plain | text", "snake__case__name {x}", f"a {variants} cat", f"a {variants} dog"]
    with caplog.at_level("WARNING", logger="zimage_runner"):
        assert texts(given) == given
    assert [r.getMessage() for r in caplog.records] == [
        f"prompts.texts[2]: {variants} is drawn as it is: prompts.template.dynamic=true makes variants of it"
    ]
