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
    assert parsed.overrides == {"num_inference_steps": 9, "negative_prompt": "red hats", "guidance_scale": 2.0}
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
    file.write_text("a sign that says --verbose\n")
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
