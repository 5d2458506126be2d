"""Free text on the command line arrives as typed, whatever Hydra's grammar thinks of it."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from zimage_runner.config.free_text import hydra_quote, quote_free_text


def parse(argv: list[str]) -> object:
    override = OverridesParser.create().parse_override(argv[0])
    assert not override.is_sweep_override()
    return OmegaConf.create({"prompt": override.value()}).prompt


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
@example("一只猫")
@example("a cat, neon (8k)")
@example('she said "hi" \\" twice')
@example("ends in backslash \\")
@example("${oc.env:HOME} and \\${x}")
@example("'single' and \"double\"")
@example("[1, 2] {a: b} a=b key=value, ,")
def test_quoted_text_parses_to_itself(text: str) -> None:
    assert parse([f"prompt={hydra_quote(text)}"]) == text


@pytest.mark.parametrize("text", ["一只猫", "a cat, neon (8k)", "50% off: $5!", "a=b", "12", "true", "a's b"])
def test_prompt_as_a_person_types_it(text: str) -> None:
    assert parse(quote_free_text([f"prompt={text}"])) == text


@pytest.mark.parametrize(
    "arg", ['prompt="a cat"', "prompt='a cat'", "prompt=null", "seeds=[1,2]", "+experiment=x", "-m"]
)
def test_left_alone(arg: str) -> None:
    assert quote_free_text([arg]) == [arg]


def test_spelled_out_sweep_stays_a_sweep_in_a_multirun() -> None:
    sweep = 'prompt="a cat","a dog"'
    assert quote_free_text(["-m", sweep]) == ["-m", sweep]
    assert quote_free_text([sweep]) != [sweep]


def test_comma_in_a_multirun_is_text_when_unquoted() -> None:
    assert quote_free_text(["-m", "prompt=a cat, neon"])[1] == 'prompt="a cat, neon"'
