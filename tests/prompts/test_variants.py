"""Variants, wildcard files and counts of random draws: every entry as it is written, within bounds, and told."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.prompt_inputs import refusal, texts
from zimage_runner.prompts.template import Combine
from zimage_runner.prompts.wildcards import find_lists

pytest.importorskip("dynamicprompts")


def drawn(caplog, text: str, **options) -> tuple[list[str], list[str]]:
    caplog.clear()
    made = texts(text, combine=Combine.random, **options)
    return made, [record.getMessage() for record in caplog.records]


def test_random_makes_as_many_as_asked_for(caplog):
    for seed in range(5):
        made, told = drawn(caplog, "{a|b|c} {d|e}", dynamic=True, count=4, seed=seed)
        assert (len(set(made)), told) == (4, [])
    made, told = drawn(caplog, "{a|b|c} {d|e}", dynamic=True, count=9)
    assert sorted(made) == ["a d", "a e", "b d", "b e", "c d", "c e"]
    assert told == ["prompts.texts[0]: there are only 6 combinations for prompts.template.count=9: each is made once"]
    made, told = drawn(caplog, "a {x}", fill={"x": ["b", "c"]}, count=3)
    assert (made, len(told)) == (["a b", "a c"], 1)
    assert drawn(caplog, "plain", fill={"x": ["b", "c"]}, count=3) == (["plain"], [])


def test_blanks_and_variants_together_make_count(caplog):
    made, told = drawn(caplog, "{x} {a|b|c|d}", fill={"x": list("efgh")}, dynamic=True, count=4)
    assert (len(made), len(set(made)), told) == (4, 4, [])


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(0, 9))
def test_random_draws_are_different_and_as_many(count, seed):
    made = texts("{a|b|c} {d|e} {f|g|a}", dynamic=True, combine=Combine.random, count=count, seed=seed)
    assert len(made) == len(set(made)) == min(count, 18)


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "None"), (True, "True"), (3.1, "3.1"), (["x"], r"['x']"), ({"a": 1}, "{'a': 1}")],
)
def test_values_that_are_no_text(value, told):
    assert refusal("{s}", fill={"s": ["ok", value]}) == (
        f"prompts.template.fill.s: {told} is no text: put it in quotation marks as you want it in the prompt"
    )


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        ("{s: [null, true, 3.10, 007, 1_000, 1e3, .5, nan, -1, 12]}",
         ["null", "true", "3.10", "007", "1_000", "1e3", ".5", "nan", "-1", "12"]),
        ("{s: ['a b', yes, 'on']}", ["a b", "yes", "on"]),
    ],
)  # fmt: skip
def test_values_on_the_command_line_stay_as_typed(typed, made):
    for argument in (f"prompts.template.fill={typed}", f"prompts.template.fill.s={typed[4:-1]}"):
        assert filled(argument) == made


def filled(argument: str) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from zimage_runner.cli.quoting import quote_free_text

    (override,) = OverridesParser.create().parse_overrides(quote_free_text([argument], multirun=False))
    value: Any = override.value()
    return [str(v) for v in (value["s"] if isinstance(value, dict) else value)]


WILDCARDS = {
    "colour.yaml": "all: [yes, 007, teal, 1.10, ~, 12:30, 2::red, 0x1F]\ndeep: {more: [on, off]}\none: no\n",
    "sub/list.yml": "- true\n- 1_000\n- {text: a b, weight: 3}\n",
    "data.json": '{"j": ["a", 7, 1.10, true, null, {"content": "c"}]}',
    "bom.txt": "\ufeffred\r\n\ufeff# no\r\n\u200b\r\nblue\ufeff\r\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in WILDCARDS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    return tmp_path


def test_wildcard_files_keep_what_is_written(folder):
    found = {name: [v.text for v in values.values()] for name, values in find_lists(folder).items()}
    assert found == {
        "all": ["yes", "007", "teal", "1.10", "~", "12:30", "red", "0x1F"],
        "deep/more": ["on", "off"],
        "one": ["no"],
        "sub/list": ["true", "1_000", "a b"],
        "j": ["a", "7", "1.10", "true", "c"],
        "bom": ["red", "blue"],
    }
    made = texts("__all__", dynamic=True, wildcards=str(folder))
    assert sorted(made) == sorted(found["all"])
    assert texts("__sub/list__ __bom__", dynamic=True, wildcards=str(folder))[:2] == ["1_000 blue", "1_000 red"]
    assert sorted(texts("__j__", dynamic=True, wildcards=str(folder))) == ["1.10", "7", "a", "c", "true"]


def test_weights_decide_random_draws_and_drop_nothing(tmp_path):
    (tmp_path / "w.yaml").write_text("w: [0.1::rare, 9::often, usual]\n", encoding="utf-8")
    assert sorted(texts("__w__", dynamic=True, wildcards=str(tmp_path))) == ["often", "rare", "usual"]
    options = {"dynamic": True, "wildcards": str(tmp_path), "combine": Combine.random}
    first = [texts(f"__w__ {n}", **options)[0].split()[0] for n in range(60)]
    assert first.count("often") > first.count("usual") > 0


def test_links_in_circles_are_followed_once(folder):
    os.symlink(folder, folder / "sub" / "round")
    os.symlink(folder, folder / "sub" / "about")
    os.mkfifo(folder / "pipe.txt")
    assert "all" in find_lists(folder)
    assert "prompts.template.wildcards=" in refusal("__pipe__", dynamic=True, wildcards=str(folder))


def test_a_name_in_two_files_is_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("red\n", encoding="utf-8")
    (tmp_path / "a.yaml").write_text("a: [blue]\n", encoding="utf-8")
    assert texts("__a__", dynamic=True, wildcards=str(tmp_path)) == ["blue"]
    told = "a.yaml: a.txt has values of __a__, too: those of a.yaml are taken"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/{told}"]


LAUGHS = "a0: &a0 [x, y, z]\n" + "".join(
    f"a{n}: &a{n} {{b: *a{n - 1}, c: *a{n - 1}, d: *a{n - 1}}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("b.yaml", LAUGHS, "b.yaml: more than 250,000 values: write out less than its aliases do"),
        ("b.yaml", "&a {b: *a}", "b.yaml:1: not readable as YAML: found unconstructable recursive node"),
        ("b.yaml", "{a: " * 70 + "}" * 70, "b.yaml: nested more than 64 deep: put lists nearer to the top"),
        ("b.yaml", "a: [b\nc: d", "b.yaml:2: not readable as YAML: "),
        ("b.yaml", "[" * 200_000, "b.yaml: nested more than 64 deep: put lists nearer to the top"),
        ("b.json", '{"a": \n', "b.json:1: not readable as JSON: Expecting value"),
        ("b.json", "[" * 100_000, "b.json: not readable: maximum recursion depth exceeded"),
        ("b.yaml", b"a: [caf\xe9]", "b.yaml:1: byte 7 (0xe9) is not UTF-8: save the file as UTF-8"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_left_out(folder, caplog, name, content, expected):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert texts("__one__", dynamic=True, wildcards=str(folder)) == ["no"]
    assert [r.getMessage()[: len(f"{folder}/{expected}")] for r in caplog.records] == [f"{folder}/{expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a|b} " * 40, "prompts.texts[0]: more than 100,000 variants: set prompts.template.combine=random"),
        ("{9$$" + "|".join("abcdefghijkl") + "}", "more than 100,000 variants"),
        ("__loop__", "prompts.texts[0]: the variants are nested too deeply"),
        ("__grow0__", "prompts.texts[0]: the variants grow to more than 1,000,000 characters: use fewer of them"),
    ],
)
@pytest.mark.parametrize("combine", list(Combine))
def test_what_grows_out_of_bounds(tmp_path, text, expected, combine):
    (tmp_path / "loop.txt").write_text("a __loop__\n", encoding="utf-8")
    for n in range(30):
        (tmp_path / f"grow{n}.txt").write_text(
            f"__grow{n + 1}__ __grow{n + 1}__\n" if n < 29 else "word\n", encoding="utf-8"
        )
    if combine is Combine.random and "more than 100,000" in expected:
        assert len(texts(text, dynamic=True, wildcards=str(tmp_path), combine=combine, count=3)) == 3
    else:
        assert expected in refusal(text, dynamic=True, wildcards=str(tmp_path), combine=combine)


def sizes(text: str) -> int:
    from zimage_runner.prompts.dynamic import _Library

    return _Library(None).size(text).count


VARIANT = st.recursive(
    st.sampled_from(["a", "b", "cd", "e f"]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda p: "{" + "|".join(dict.fromkeys(p)) + "}")
        | st.lists(inner, min_size=2, max_size=3).map(lambda p: "{1-2$$" + "|".join(dict.fromkeys(p)) + "}")
        | st.lists(inner, min_size=2, max_size=2).map(" ".join)
    ),
    max_leaves=6,
)


@settings(max_examples=20)
@given(VARIANT)
def test_the_count_is_never_below_what_the_library_makes(text):
    from zimage_runner.prompts.dynamic import _Library

    made = _Library(None).all(text)
    assert len(made) <= sizes(text)
    assert max(map(len, made)) <= _Library(None).size(text).longest


@pytest.mark.parametrize(
    ("text", "count"),
    [("a", 1), ("{a|b} {c|d|e}", 6), ("{2$$a|b|c}", 6), ("{1-2$$a|b|{c|d}}", 14), ("${v={a|b}} ${v} x", 2)],
)
def test_the_count_of_usual_texts_is_exact(text, count):
    assert sizes(text) == count


def test_a_lone_word_in_braces_is_told(caplog):
    assert texts("a {animal} {x|y}", dynamic=True) == ["a animal x", "a animal y"]
    assert [r.getMessage() for r in caplog.records] == [
        "prompts.texts[0]: {animal} has one variant, the word itself: prompts.template.fill.animal=[...] fills it"
    ]
