"""Flags at the end of a text line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.flags import parse_flags
from zimage_runner.prompts.text_file import TextFile


def test_all_short_flags():
    parsed = parse_flags('a cat, 8k --w 512 --h 768 --s 4 --d 1,5-7 --n "ugly, blurry" --g 3.5', "f:1")
    assert parsed.text == "a cat, 8k"
    assert parsed.seeds == (1, 5, 6, 7)
    assert parsed.overrides == {
        "width": 512,
        "height": 768,
        "num_inference_steps": 4,
        "negative_prompt": "ugly, blurry",
        "guidance_scale": 3.5,
    }


def test_long_flags_of_other_tools():
    parsed = parse_flags("a cat --steps 9 --seed 3 --no red hats --cfg_scale 2", "f:1")
    assert parsed.overrides == {"num_inference_steps": 9, "negative_prompt": "red hats", "guidance_scale": 1.0}
    assert parsed.seeds == (3,)


@pytest.mark.parametrize("text", ["a well--known cat", "a cat -- and a dog", "1 --2 3", "a-b --- c"])
def test_dashes_in_text_are_not_flags(text):
    assert parse_flags(text, "f:1").text == text


@pytest.mark.parametrize(
    "line", ["a cat -w 512", "a cat \u2014w 512 --h 256", "a cat --h 256 \u2013d 1,2", "-n 'x' a cat"]
)
def test_flags_with_another_dash_are_told(tmp_path, line):
    file = tmp_path / "p.txt"
    file.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"p\.txt:1: .[wdn] looks like a flag: write --[wdn] with two hyphens; if it is"
    ):
        read_prompts(TextFile(path=str(file)))
    assert read_prompts(TextFile(path=str(file), flags=False))[0].text == line


@pytest.mark.parametrize("line", ["a cat - w 5", "x-w 5", "a \u2014 d 5", "size -s medium", "\u2014no hats", "a-g 4"])
def test_dashes_of_prose(tmp_path, line):
    file = tmp_path / "p.txt"
    file.write_text(f"{line}\n", encoding="utf-8")
    assert read_prompts(TextFile(path=str(file)))[0].text == line


def test_flags_can_be_switched_off(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a sign that says --verbose\n", encoding="utf-8")
    assert read_prompts(TextFile(path=str(file), flags=False))[0].text == "a sign that says --verbose"


@given(
    text=st.text(alphabet="ab c,()一猫-", min_size=1).map(str.strip).filter(lambda t: t and "--" not in t),
    width=st.integers(1, 5000),
    seeds=st.lists(st.integers(0, 99), min_size=1, unique=True),
    order=st.permutations(["w", "d", "n"]),
)
def test_flags_round_trip(text, width, seeds, order):
    values = {"w": str(width), "d": ",".join(map(str, seeds)), "n": "ugly cat"}
    line = text + "".join(f" --{name} {values[name]}" for name in order)
    parsed = parse_flags(line, "f:1")
    assert (parsed.text, parsed.seeds) == (text, tuple(seeds))
    assert parsed.overrides == {"width": width, "negative_prompt": "ugly cat"}


@pytest.mark.parametrize(
    ("line", "text", "overrides", "seeds"),
    [
        ('"a photo of ladybird" --s 4', "a photo of ladybird", {"num_inference_steps": 4}, None),
        ("'it' and 'that' --s 4", "'it' and 'that'", {"num_inference_steps": 4}, None),
        ('a "red" cat --s 4', 'a "red" cat', {"num_inference_steps": 4}, None),
        ("a cat --seed=7 --w=128", "a cat", {"width": 128}, (7,)),
        ('--prompt "a cat" --negative_prompt "a dog" --steps 5', "a cat",
         {"negative_prompt": "a dog", "num_inference_steps": 5}, None),
        ("a cat --negative-prompt=x y --num-inference-steps 3", "a cat",
         {"negative_prompt": "x y", "num_inference_steps": 3}, None),
        ("a cat --d 1.0,3", "a cat", {}, (1, 3)),
        ("a cat --l 3 --H 64", "a cat", {"guidance_scale": 3.0, "height": 64}, None),
        ('"a cat"', '"a cat"', {}, None),
    ],
)  # fmt: skip
def test_lines_as_other_tools_take_them(line, text, overrides, seeds):
    parsed = parse_flags(line, "f:1")
    assert (parsed.text, parsed.overrides, parsed.seeds) == (text, overrides, seeds)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat \u2014seed 42", "\u2014seed looks like a flag: write --seed with two hyphens"),
        ("a cat -seed 12", "-seed looks like a flag: write --seed with two hyphens"),
        ("a cat -n blurry", "-n looks like a flag: write --n with two hyphens"),
        ("a cat -w=128", "-w looks like a flag: write --w with two hyphens"),
        ("a cat \u2013steps 3", "\u2013steps looks like a flag: write --steps with two hyphens"),
        ("a cat -negative_prompt blurry", "-negative_prompt looks like a flag: write --negative_prompt with two"),
        ("a cat--w 128", "--w looks like a flag: write a blank before it"),
        ("a cat --h 64--seed=3", "--seed looks like a flag: write a blank before it"),
        ("a cat, 8k--n blurry", "--n looks like a flag: write a blank before it"),
        ("--prompt x --prompt y", "--prompt sets text a second time: keep one"),
        ("a cat --prompt x", "--prompt sets text a second time: keep one"),
        ("a cat --sampler_name Euler", "unknown flag --sampler_name: Euler is the model's own sampler, leave it out."),
        (
            "a cat --iw 0.5",
            "unknown flag --iw: how much of a picture is drawn anew is --strength 0.6, with --image FILE.",
        ),
        ("a cat --batch_size 4", "unknown flag --batch_size: for several pictures give several seeds, --d 1-4 or"),
    ],
)
def test_lines_that_would_be_drawn_wrong(tmp_path, line, told):
    file = tmp_path / "p.txt"
    file.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(TextFile(path=str(file)))
    assert str(caught.value).startswith(f"{file}:1: {told}")
    if "looks like" in told:
        assert str(caught.value).endswith("; if it is part of the text, set prompts.flags=false")
    assert read_prompts(TextFile(path=str(file), flags=False))[0].text == line


@pytest.mark.parametrize(
    "line",
    ["a yes--no sign", "a cat--seed of doubt", "well--width unknown", "a -nice cat", "rock -n- roll", "a\u2014width"],
)
def test_more_dashes_of_prose(tmp_path, line):
    file = tmp_path / "p.txt"
    file.write_text(f"{line}\n", encoding="utf-8")
    assert read_prompts(TextFile(path=str(file)))[0].text == line
