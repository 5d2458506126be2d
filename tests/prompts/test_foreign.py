"""Syntax of other programs in prompts: drawn as text, told once, with what to do instead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.foreign import KINDS, LoraTag, lora_tags
from zimage_runner.prompts.generation_data import of_parameters
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.template import Template
from zimage_runner.prompts.text_file import TextFile

SIZE = "set the size, --w 1344 --h 768 on text lines or sampling.width and sampling.height"
WEIGHTS = "Z-Image has no weights for words; say it in words, or say it first"
STEPS = "a prompt is the same at every step; write the prompt of the picture that you want"


def told(caplog, *texts: str) -> list[str]:
    caplog.clear()
    assert [p.text for p in read_prompts(Inline(texts=list(texts)))] == list(texts)
    return [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(
    ("text", "found", "remedy"),
    [
        ("a cat <lora:foo:0.8> x", "<lora:foo:0.8>", "lora_dirs=[FOLDER] says where its file is"),
        ("embedding:EasyNegative", "embedding:EasyNegative",
         "textual inversions and other tools' tags are not read; leave it out"),
        ("a (red:1.4) cat", "(red:1.4)", WEIGHTS),
        ("a (red fox: .5) cat", "(red fox: .5)", WEIGHTS),
        ("a ((red)) cat", "((red))", WEIGHTS),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]", STEPS),
        ("a [cat|dog]", "[cat|dog]", STEPS),
        ("a cat BREAK a dog", "BREAK", "there are no chunks of 75 tokens to part; leave it out"),
        ("a cat AND a dog", "AND", "prompts are not combined; write one sentence"),
        ("a cat --ar 16:9", "--ar 16:9", SIZE),
        ("a cat --v 6", "--v 6", "the model is chosen for the whole run, model=NAME"),
        ("a cat --steps 4", "--steps 4",
         "flags are read on the lines of text files; sampling.num_inference_steps is for the whole run"),
        ("a cat --seed=4", "--seed=4", "flags are read on the lines of text files; seeds is for the whole run"),
        ("a {animal} apple", "{animal}", "prompts.template.fill.animal='[one,two]' fills it"),
    ],
)  # fmt: skip
def test_each_kind_is_told_once(caplog, text, found, remedy):
    assert told(caplog, "plain", text, text + " again") == [f"prompts.texts[1]: {found} is drawn as text: {remedy}"]


@pytest.mark.parametrize(
    "text",
    [
        "at (10:30) in the morning", "a ratio of (16:9)", "a sign that says ROCK AND ROLL", "BREAKFAST", "a C++ book",
        "a cat (red) [x] {}", "a -- b --- c", "a well--known cat", "I <3 cats", "{{x}}", "f(x) = {x}", "see [1]",
        "a_b__c",
    ],
)  # fmt: skip
def test_prose_is_left_alone(caplog, text):
    assert told(caplog, text) == []


def test_kinds_are_told_apart_and_negatives_are_looked_at(tmp_path, caplog):
    (tmp_path / "p.txt").write_text(
        "a cat --g 2 --n (worst quality:1.4)\na <lora:x:1> (b:1.2) dog\n<lora:y:1>\n", encoding="utf-8"
    )
    read_prompts(TextFile(path=str(tmp_path / "p.txt")))
    assert [r.getMessage().partition(f"{tmp_path}/")[2].partition(" is")[0] for r in caplog.records] == [
        "p.txt:1: (worst quality:1.4)",
        "p.txt:2: <lora:x:1>",
    ]


def test_braces_that_a_template_wrote_are_meant(caplog):
    source = Inline(texts=["{{animal}} {x}"], template=Template(fill={"x": ["cat"]}))
    assert [p.text for p in read_prompts(source)] == ["{animal} cat"]
    assert caplog.records == []


def test_flags_of_other_tools_in_text_files(tmp_path):
    from tests.support.prompt_inputs import message

    (tmp_path / "p.txt").write_text("a cat --ar 16:9\n", encoding="utf-8")
    assert message(TextFile(path=str(tmp_path / "p.txt"))) == (
        f"{tmp_path}/p.txt:1: unknown flag --ar: {SIZE}. If it is part of the text, set prompts.flags=false"
    )
    assert read_prompts(TextFile(path=str(tmp_path / "p.txt"), flags=False))[0].text == "a cat --ar 16:9"


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("<lora:foo:0.8>", [("foo", 0.8)]),
        ("<LORA:my file.v2:1> b <lyco:x>", [("my file.v2", 1.0), ("x", 1.0)]),
        ("<lora:a:-.5:te=1>", [("a", -0.5)]),
        ("<lora:a:te=0.25>", [("a", 0.25)]),
        ("<lora:> <lora> lora:a:1", []),
    ],
)
def test_lora_tags(text, tags):
    found = lora_tags(text)
    assert [(tag.name, tag.weight) for tag in found] == tags
    assert all(text[tag.start] == "<" and text[tag.end - 1] == ">" for tag in found)


@given(
    st.text("ab .", max_size=8), st.text("abc_.-", min_size=1, max_size=9), st.floats(-4, 4).map(lambda w: round(w, 3))
)
def test_lora_tags_are_found_where_they_stand(before, name, weight):
    tag = f"<lora:{name}:{weight}>"
    text = f"{before}{tag}{before}"
    assert lora_tags(text) == [LoraTag(name, weight, len(before), len(before) + len(tag))]


@given(st.text(st.sampled_from("()[]{}<>:|_-ABDNRE.1a "), max_size=40).filter(str.strip))
def test_any_text_is_drawn(text):
    assert read_prompts(Inline(texts=[text]))[0].text == text.strip()


LONG = 300_000


@pytest.mark.parametrize(
    "part", ["a", "{", "(", "[", "<lora:", "--", "a:", " ", "__", "AND ", "(a:", "\\", "{a|", "--a "]
)
def test_a_long_text_is_read_in_time(part):
    """Each pattern looks at each letter a few times: the square of such a length would take the suite's limit."""
    text = "x" + part * (LONG // len(part)) + "x"
    for find, _ in KINDS.values():
        find(text)
    lora_tags(text)
    of_parameters(f"a cat\nSteps: 8, {text}")
