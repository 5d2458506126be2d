"""The shipped tokenizer: nothing is unknown, padding and the template are as in training."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.cases import load_cases
from training.pools import bucket_of
from training.tokenizer import CHAT_TEMPLATE, chat

ROOT = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "zimage_runner" / "assets" / "zimage_nano" / "tokenizer")


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=0x2FFF, categories=["Ll", "Nd", "Po"]), max_size=40)
)
def test_any_text_round_trips_up_to_case_and_compatibility(text: str) -> None:
    once = TOKENIZER.decode(TOKENIZER(text)["input_ids"])
    assert TOKENIZER.decode(TOKENIZER(once)["input_ids"]) == once
    if text.isascii():
        assert once == text.lower()


@pytest.mark.parametrize("text", ["一只猫", "zzyx", "emoji😀", "Ω≈ç"])
def test_no_text_is_lost(text: str) -> None:
    assert TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(TOKENIZER("一只猫")["input_ids"]) == "一只猫"


def test_template_is_the_one_of_training() -> None:
    message = [{"role": "user", "content": "a cat"}]
    assert TOKENIZER.chat_template == CHAT_TEMPLATE
    templated = TOKENIZER.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert templated == chat("a cat")


def test_padding_is_zero_on_the_right() -> None:
    ids = TOKENIZER([chat("a cat"), chat("a cat and a dog and a rocket")], padding=True)["input_ids"]
    assert ids[0][-1] == TOKENIZER.pad_token_id == 0
    assert ids[0][0] != 0


def test_evaluation_captions_are_short_enough_for_the_trained_buckets() -> None:
    lengths = [
        len(ids)
        for ids in TOKENIZER([chat(c.prompt) for c in load_cases(ROOT / "training" / "reference")])["input_ids"]
    ]
    assert {bucket_of(n) for n in lengths} <= {32, 64, 96}
