"""Free text on the command line arrives as typed, whatever Hydra's grammar thinks of it."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from zimage_runner.cli.quoting import hydra_quote, quote_free_text
from zimage_runner.errors import UserError


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


def value_of(arg: str, *before: str) -> object:
    override = OverridesParser.create().parse_override(quote_free_text([*before, arg])[-1])
    value = override.value()
    if override.is_sweep_override():
        return [value_of(f"prompts.texts={choice}") for choice in override.sweep_string_iterator()]
    return OmegaConf.to_container(OmegaConf.create({"v": value}), resolve=True)["v"]  # pyright: ignore


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("[一只猫,一只狗]", ["一只猫", "一只狗"]),
        ("[a red fox, it's]", ["a red fox", "it's"]),
        ("""[a red fox, "it's"]""", ["a red fox", "it's"]),
        ("[a cat (8k, hdr), a dog :)]", ["a cat (8k, hdr)", "a dog :)"]),
        ("[a {red|blue} {x}, b\\, c]", ["a {red|blue} {x}", "b, c"]),
        ('[ratio 16:9, k=v, 5" disk, 50%, [red] fox]', ["ratio 16:9", "k=v", '5" disk', "50%", "[red] fox"]),
        ("[1.50, true, null, 1e3]", ["1.50", "true", "null", "1e3"]),
        ("[a ${b}, 猫,]", ["a ${b}", "猫"]),
        ("[一只猫，坐着, 狗]", ["一只猫，坐着", "狗"]),
        ("[one,\n two]", ["one", "two"]),
        ("[]", []),
    ],
)
def test_lists_of_prompts_as_a_person_types_them(given: str, texts: list[str]) -> None:
    assert value_of(f"prompts.texts={given}") == texts


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("prompts.metadata=[author, 标题]", ["author", "标题"]),
        ("prompts.columns={text: 标题, id: image id}", {"text": "标题", "id": "image id"}),
        ("prompts.columns.text=标题", "标题"),
        ("prompts.template.fill={x: [狗 (1), b, 3], y: f.txt}", {"x": ["狗 (1)", "b", 3], "y": "f.txt"}),
        ("prompts.template.fill.x=[红色, 蓝色]", ["红色", "蓝色"]),
        ("executor.resources={tpu: 1, big-disk: 0.5}", {"tpu": 1, "big-disk": "0.5"}),
    ],
)
def test_other_fields_of_free_text_entries(arg: str, value: object) -> None:
    assert value_of(arg) == value


def test_lists_of_prompts_are_swept_as_lists() -> None:
    assert value_of("prompts.texts=[一,二],[三]", "-m") == [["一", "二"], ["三"]]
    assert value_of("prompts.texts=[一,二]", "-m") == ["一", "二"]
    assert quote_free_text(["-m", "prompts.texts=choice([a],[b])"])[1] == "prompts.texts=choice([a],[b])"


words = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=",()[]{}\\\"'$\u2028\u2029"), min_size=1
)


@given(st.lists(words.map(str.strip).filter(bool), min_size=1))
def test_a_comma_separates_whatever_the_script(texts: list[str]) -> None:
    assert value_of(f"prompts.texts=[{', '.join(texts)}]") == texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1))
def test_quoted_entries_stay_what_they_are(texts: list[str]) -> None:
    assert value_of(f"prompts.texts=[{','.join(map(hydra_quote, texts))}]") == texts


@given(st.text(st.sampled_from("ab猫,()[]{}\"' :\\"), max_size=12), st.booleans())
def test_any_list_is_taken_or_refused_in_our_words(text: str, multirun: bool) -> None:
    given = f"prompts.texts=[{text}]"
    if is_unclear(given, multirun):
        return
    (arg,) = quote_free_text([given], multirun)
    OverridesParser.create().parse_override(arg)
    assert quote_free_text([arg], multirun) == [arg], "a saved command line is read again by resume"


def is_unclear(arg: str, multirun: bool) -> bool:
    """True when ``arg`` is refused, which is done in our words."""
    try:
        quote_free_text([arg], multirun)
    except UserError as error:
        return "write prompts.texts='[" in str(error) or pytest.fail(str(error))
    return False


@pytest.mark.parametrize(
    ("arg", "problem"),
    [
        ("prompts.texts=一只猫", "a list is needed"),
        ("prompts.texts=[a", r"the \[ is not closed by a \] at the end"),
        ("prompts.texts=[a,,b]", "an entry is empty"),
        ("prompts.texts=['a, b]", "the quotation mark before a, b is not closed"),
        ("prompts.texts=[a (b, c]", r"a bracket is open where \) is missing"),
        ('prompts.texts=["big" dog, b]', "is quoted in part only"),
        ("prompts.columns={标题: text}", "the name 标题 can be set in an experiment file only"),
        ("prompts.columns={text}", "text has no name and colon before it"),
    ],
)
def test_unclear_lists_are_refused_with_a_form_that_works(arg: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        quote_free_text([arg])
    remedy = str(caught.value).rpartition("write ")[2].replace("'", "")
    assert quote_free_text([remedy])
    with pytest.raises(UserError, match="write prompts"):
        quote_free_text(["-m", arg])


def test_words_of_any_script_in_any_field() -> None:
    assert value_of("output.root=输出/my cats") == "输出/my cats"
    assert value_of("name=猫,狗", "-m") == ["猫", "狗"]
    assert value_of("prompts.delimiter=;") == ";"
