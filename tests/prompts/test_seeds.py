"""Seeds in each of their forms, and each way to get them wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.prompts.seeds import MAX_SEED, parse_seeds

seed = st.integers(0, MAX_SEED)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, (42,)),
        ("42", (42,)),
        ([1, 2, 3], (1, 2, 3)),
        ("0-3, 42", (0, 1, 2, 3, 42)),
        (["5-6", 1], (5, 6, 1)),
        ({"count": 3}, (0, 1, 2)),
        ({"count": 2, "base": 7}, (7, 8)),
        (MAX_SEED, (MAX_SEED,)),
        ("{count: 2, base: 7}", (7, 8)),
        ("{count:2}", (0, 1)),
        ("[0-1, 42]", (0, 1, 42)),
    ],
)
def test_forms(value, expected):
    assert parse_seeds(value).for_text("anything") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "seeds=[] is empty"),
        ("", "seeds='': '' is neither a seed nor a range"),
        (-1, "seeds: -1 is out of range: use 0 to 9223372036854775807; for another picture each time seeds=$RANDOM"),
        ("random", "seeds='random': a run's seeds are known before it starts: write seeds=$RANDOM"),
        ("-1", "seeds: -1 is out of range"),
        (2**63, "seeds: 9223372036854775808 is out of range"),
        ([1, 2, 1], "seeds: 1 is given twice"),
        ("0-5,3", "seeds: 3 is given twice"),
        ("9-3", "seeds: the range 9-3 runs backwards: write 3-9"),
        ("1,x", "seeds='1,x': 'x' is neither a seed nor a range"),
        ("0-99999999999", "seeds names 100,000,000,000 seeds: use at most 1,000,000"),
        ([1.5], "seeds: 1.5 is not an integer"),
        ([True], "seeds: True is not an integer"),
        (True, "seeds: True is not an integer"),
        (None, "seeds=None is not a seed list"),
        ([[1]], "seeds: [1] is not an integer"),
        ({"count": 10**9}, "seeds names 1,000,000,000 seeds: use at most 1,000,000"),
        ({"count": 0}, "seeds.count=0 is not an integer from 1 to 1000000"),
        ({"base": 3}, "seeds.count=None is not an integer"),
        ({"count": 2, "base": -1}, "seeds.base=-1 is not an integer"),
        ({"count": 2, "base": MAX_SEED}, "seeds: 9223372036854775808 is out of range"),
        ({"count": 2, "derive": "image"}, "seeds.derive='image' is unknown: write derive: prompt"),
        ({"count": 2, "bass": 1}, "seeds.bass is unknown"),
        ("{count: 2, derive: image}", "seeds.derive='image' is unknown"),
        ("{count: 2", "seeds='{count: 2' is not a mapping"),
        ("{}", "seeds='{}' is not a mapping"),
        ("{count: x}", "seeds.count='x' is not an integer"),
    ],
)
def test_bad_seeds(value, expected):
    with pytest.raises(UserError) as caught:
        parse_seeds(value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(seed, min_size=1, unique=True))
def test_lists_round_trip(values):
    assert parse_seeds(values).values == tuple(values)
    assert parse_seeds(",".join(map(str, values))).values == tuple(values)


@given(st.text(min_size=1), st.text(min_size=1), st.integers(1, 20), seed)
def test_derived_seeds_depend_on_the_text_alone(text, other, count, base):
    seeds = parse_seeds({"count": count, "derive": "prompt", "base": base})
    mine = seeds.for_text(text)
    assert len(set(mine)) == count == len(seeds)
    assert all(0 <= s < 2**32 for s in mine)
    assert mine == parse_seeds({"count": count + 1, "derive": "prompt", "base": base}).for_text(text)[:count]
    assert (mine == seeds.for_text(other)) == (text == other) or count == 1


def test_derived_seeds_never_change():
    """Pinned: another version of the program must give the same pictures."""
    assert parse_seeds({"count": 2, "derive": "prompt"}).for_text("a cat") == PINNED


PINNED = (2448112762, 2696015623)
