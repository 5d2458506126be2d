"""Expansion, order, buckets, batches, fingerprints, duplicates and truncations."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.plan import Fingerprints, build_plan, fingerprint, slug
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.sampling import SamplingParams

PARAMS = SamplingParams(
    height=128,
    width=128,
    num_inference_steps=8,
    guidance_scale=0.0,
    negative_prompt="",
    max_sequence_length=512,
    cfg_normalization=0.0,
    cfg_truncation=1.0,
)


def any_size(height: int, width: int) -> None:
    pass


def by_length(texts):
    return [len(t) for t in texts]


def plan_of(prompts, seeds: Any = "0-1", params=PARAMS, count_tokens=by_length):
    return build_plan(prompts, parse_seeds(seeds), params, check_size=any_size, count_tokens=count_tokens)


prompts_strategy = st.lists(
    st.builds(
        Prompt,
        text=st.text(min_size=1, max_size=80).filter(str.strip),
        overrides=st.sampled_from([{}, {"width": 256}, {"num_inference_steps": 4}, {"guidance_scale": 2.0}]),
        seeds=st.sampled_from([None, (7,), (1, 9)]),
    ),
    min_size=1,
    max_size=20,
)


@given(prompts_strategy, st.integers(1, 5), st.sets(st.integers(0, 60)))
def test_batches_hold_every_item_once(prompts, batch_size, finished):
    plan = plan_of(prompts)
    wanted = {(i, s) for i, p in enumerate(prompts) for s in p.seeds or (0, 1)}
    assert len(plan) == len(wanted) > 0
    assert {(i.prompt_index, i.seed) for i in plan.items} == wanted
    done = {id(item) for n, item in enumerate(plan.items) if n in finished}
    batches = list(plan.batches(batch_size, lambda item: id(item) in done))
    assert all(1 <= len(b) <= batch_size and len({i.bucket for i in b}) == 1 for b in batches)
    drawn = [id(i) for b in batches for i in b]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) | done == {id(i) for i in plan.items}


@given(prompts_strategy)
def test_order_is_bucket_then_prompt_then_seed(prompts):
    items = plan_of(prompts).items
    keys = [(i.bucket, i.prompt_index, i.seed) for i in items]
    buckets = [k for n, (k, _, _) in enumerate(keys) if n == 0 or keys[n - 1][0] != k]
    assert len(buckets) == len(set(buckets)), "each bucket runs in one piece"
    for bucket in buckets:
        mine = [k[1] for k in keys if k[0] == bucket]
        assert mine == sorted(mine)
    assert [b.cost for b in buckets] == sorted((b.cost for b in buckets), reverse=True)


@given(prompts_strategy)
def test_directories_are_unique_and_safe(prompts):
    dirs = [i.item_dir for i in plan_of(prompts).items]
    assert len(dirs) == len(set(dirs))
    for d in dirs:
        assert re.fullmatch(r"items/\d{5}_[^/]+/seed_\d+", d)
        assert len(d.split("/")[1].encode()) <= 130


@given(prompts_strategy, st.randoms())
def test_pictures_do_not_depend_on_order(prompts, rng):
    def prints(some):
        print_of = Fingerprints("w", {"dtype": "float32"})
        return {(i.prompt.text, i.seed, i.params): print_of(i) for i in plan_of(some).items}

    shuffled = list(prompts)
    rng.shuffle(shuffled)
    assert prints(prompts) == prints(shuffled)


def test_fingerprint_changes_with_everything_that_changes_the_picture():
    (item,) = plan_of([Prompt(text="a cat")], seeds=[3]).items
    same = [item, replace(item, prompt_index=9), replace(item, prompt=replace(item.prompt, id="x", source="y"))]
    same.append(replace(item, params=replace(PARAMS, cfg_truncation=0.5, cfg_normalization=1.0)))
    guided = replace(item, params=replace(PARAMS, guidance_scale=1.0))
    different = [
        replace(item, seed=4),
        replace(item, prompt=Prompt(text="a cat ")),
        replace(item, params=replace(PARAMS, height=256)),
        replace(item, params=replace(PARAMS, num_inference_steps=7)),
        guided,
        replace(item, params=replace(guided.params, cfg_truncation=0.5)),
        replace(item, params=replace(guided.params, negative_prompt="dog")),
    ]
    numerics = {"dtype": "float32"}
    assert {fingerprint(i, "w", numerics) for i in same} == {fingerprint(item, "w", numerics)}
    prints = [fingerprint(i, "w", numerics) for i in [item, *different]]
    prints += [fingerprint(item, "w2", numerics), fingerprint(item, "w", {"dtype": "bfloat16"})]
    assert len(set(prints)) == len(prints)


def test_fingerprint_never_changes():
    """Pinned: files of earlier runs are found again by it."""
    (item,) = plan_of([Prompt(text="一只猫")], seeds=[3]).items
    assert fingerprint(item, "w", {"dtype": "float32"}) == PINNED


def test_buckets_follow_padded_caption_length():
    prompts = [Prompt(text="x" * n) for n in (1, 32, 33, 600)]
    plan = plan_of(prompts, seeds=[0])
    assert [(i.prompt_index, i.bucket.caption_tokens) for i in plan.items] == [(3, 512), (2, 64), (0, 32), (1, 32)]
    assert [str(t) for t in plan.truncations] == [
        "prompt: the prompt has 600 tokens, the last 88 are cut off (max_sequence_length=512)"
    ]
    assert {i.bucket.caption_tokens for i in plan_of(prompts, count_tokens=None).items} == {0}


def test_guidance_counts_the_negative_prompt():
    params = replace(PARAMS, guidance_scale=4.0, negative_prompt="n" * 40)
    plan = plan_of([Prompt(text="a"), Prompt(text="b", overrides={"negative_prompt": ""})], params=params)
    assert {(i.prompt.text, i.bucket.negative_caption_tokens) for i in plan.items} == {("a", 64), ("b", 0)}
    assert set(plan.encodings()) == {("a", 512), ("n" * 40, 512), ("b", 512), ("", 512)}


def test_each_text_is_encoded_once():
    plan = plan_of([Prompt(text="a"), Prompt(text="b"), Prompt(text="a", overrides={"width": 256})], seeds="0-9")
    assert sorted(plan.encodings()) == [("a", 512), ("b", 512)]
    assert list(plan.buckets().values()) == [10, 20]


def test_duplicates_are_found():
    prompts = [Prompt(text="a"), Prompt(text="b"), Prompt(text="a", seeds=(1, 5)), Prompt(text="a", seeds=(0, 5))]
    found = plan_of(prompts).duplicates
    assert [(prompts.index(d.prompt), prompts.index(d.first), d.seeds) for d in found] == [(2, 0, (1,)), (3, 0, (0, 5))]


def test_bad_override_names_its_line():
    with pytest.raises(UserError, match=r"p\.txt:3: sampling\.width=100 is not a positive multiple of 16: use 96"):
        plan_of([Prompt(text="a"), Prompt(text="b", source="p.txt:3", overrides={"width": 100})])


def test_size_is_checked_for_each_prompt():
    def only_128(height, width):
        if (height, width) != (128, 128):
            raise UserError("only 128x128")

    with pytest.raises(UserError, match=r"p\.txt:1: only 128x128"):
        build_plan(
            [Prompt(text="b", source="p.txt:1", overrides={"width": 256})], parse_seeds(1), PARAMS, check_size=only_128
        )


def test_too_many_items():
    with pytest.raises(UserError, match="are 11,000,000 pictures: use at most 10,000,000"):
        plan_of([Prompt(text=str(i)) for i in range(11)], seeds={"count": 1_000_000})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Cat, neon (8k)!", "a_cat_neon_8k"),
        ("一只猫，霓虹灯", "一只猫_霓虹灯"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "prompt"),
        ("\u202egnp.exe\u202c", "gnp_exe"),
        ("a\x1b[31mb\nc\td", "a_31mb_c_d"),
        ("Café Ærø", "cafe_r"),
        ("東京タワー", "東京タワー"),
        ("x" * 100, "x" * 40),
        ("CON", "con"),
        ("🐱", "prompt"),
    ],
)
def test_slugs(text, expected):
    assert slug(text) == expected


@given(st.text(min_size=1))
def test_slugs_are_always_safe(text):
    name = slug(text)
    assert 1 <= len(name) <= 40
    assert not {unicodedata.category(c) for c in name} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not set(name) & set('/\\.:*?"<>| \0')


PINNED = "074a5e6452697e164fa6c7657a59b0cb9754f70c02584e4bcb55b7de8b25fdeb"


def test_a_prompts_own_negative_without_guidance_is_told_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [
        Prompt(text="a", source="p.txt:1"),
        Prompt(text="b", source="p.txt:2", overrides={"negative_prompt": "blurry"}),
        Prompt(text="c", source="p.txt:3", overrides={"negative_prompt": "blurry", "guidance_scale": 3.0}),
        Prompt(text="d", source="p.txt:4", overrides={"negative_prompt": "dull", "guidance_scale": 0.0}),
    ]
    params = replace(PARAMS, guidance_scale=0.0, negative_prompt="")
    plan = build_plan(prompts, parse_seeds([1]), params, check_size=lambda h, w: None)
    assert {item.prompt.text: item.params.negative_prompt for item in plan.items} == {
        "a": "", "b": "", "c": "blurry", "d": "",
    }  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage().startswith("p.txt:2 and 1 more: the negative prompt does nothing with guidance_scale=0")
