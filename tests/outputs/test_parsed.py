"""Files that anybody may have written become plain values or one error, never a crash, a hang or a flood."""

from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_runner.outputs.parsed import DEEPEST, MOST_ALIASES, from_json, from_yaml, mapping

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested more than"),
        ("{a: " * 100_000, "nested more than"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than"),
        (BOMB, "aliases unfold"),
        ("a: &a [*a]", "aliases unfold"),
        ("a: &a [x]\nb: [" + "*a, " * (MOST_ALIASES + 1) + "]", "aliases unfold"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("!!bool 3", "cannot be read"),
        ("!!timestamp x", "cannot be read"),
        ("2020-99-99", "month must be"),
        ("? [a]\n: b", "unhashable"),
        ("a: \0", "unacceptable character"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: [", "expected"),
    ],
)
def test_yaml_that_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_yaml(text)
    with pytest.raises(ValueError, match=r".") as refused:
        from_yaml(text.encode())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "\0", ""])
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


@given(VALUES)
@settings(max_examples=30)
def test_what_is_whole_comes_back(value: object) -> None:
    assert from_json(json.dumps(value)) == value
    assert from_yaml(yaml.safe_dump(value).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet="{}[]&*a:!\n -?|>'\"%@0x.1e", max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_one_error(data: bytes) -> None:
    for parse in (from_json, from_yaml):
        with contextlib.suppress(ValueError):
            parse(data)


def test_a_mapping_or_nothing() -> None:
    assert mapping({"a": 1}) == {"a": 1}
    assert [mapping(value) for value in (None, [], "a", 1)] == [{}] * 4
