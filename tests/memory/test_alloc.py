"""Allocator settings: rendered, checked, and exported before torch starts CUDA."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.memory.alloc import VARIABLES, alloc_string, check_text
from zimage_runner.memory.policies import AllocFields, Loading, Resident, SequentialOffload

ARTICLE = "max_split_size_mb:512,garbage_collection_threshold:0.8"
large = st.none() | st.integers(21, 100_000)


@given(
    split=large,
    rounding=large,
    threshold=st.none() | st.floats(0.01, 0.99),
    expandable=st.none() | st.booleans(),
    divisions=st.none() | st.sampled_from([1, 2, 4, 8, 16]),
    backend=st.sampled_from([None, "native"]),
)
def test_named_fields_render_to_what_the_text_would_say(split, rounding, threshold, expandable, divisions, backend):
    fields = AllocFields(
        backend=backend,
        max_split_size_mb=split,
        max_non_split_rounding_mb=rounding,
        garbage_collection_threshold=threshold,
        expandable_segments=expandable,
        roundup_power2_divisions=divisions,
    )
    text = alloc_string(None, fields)
    parsed = dict(part.split(":") for part in text.split(",")) if text else {}
    assert parsed == {name: str(value) for name, value in fields.values().items()}
    if text:
        check_text(text)


def test_the_articles_string_by_name():
    assert AllocFields(max_split_size_mb=512, garbage_collection_threshold=0.8).render() == ARTICLE


@pytest.mark.parametrize(
    "text", [ARTICLE, "expandable_segments:True", "roundup_power2_divisions:[256:1,512:2,>:4],backend:native"]
)
def test_good_text(text):
    check_text(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_split_size_mb", "is not key:value"),
        ("max_split_size_mb:", "is not key:value"),
        ("", "is not key:value"),
        ("max_split_size:512", "did you mean max_split_size_mb?"),
        (ARTICLE + ",nonsense:1", "torch's allocator has no setting 'nonsense'"),
    ],
)
def test_bad_text(text, says, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: "2.13.0+cpu")
    with pytest.raises(UserError) as caught:
        Resident(alloc_conf=text)
    assert says in str(caught.value)
    assert "memory.alloc_conf" in str(caught.value)


def test_a_key_of_a_later_torch_is_left_to_it(monkeypatch):
    text = "pinned_free_catch_all:True"
    monkeypatch.setattr(metadata, "version", lambda _: "2.14.0.dev20261101+cu130")
    check_text(text)
    with pytest.raises(UserError, match="is not key:value"):
        check_text("pinned_free_catch_all")
    monkeypatch.setattr(metadata, "version", lambda _: "2.9.1")
    with pytest.raises(UserError, match="no setting 'pinned_free_catch_all'"):
        check_text(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"backend": "jemalloc"}, "use native or cudaMallocAsync"),
        ({"max_split_size_mb": 20}, "use more than 20"),
        ({"garbage_collection_threshold": 1.0}, "is out of range"),
        ({"garbage_collection_threshold": float("nan")}, "is out of range"),
        ({"roundup_power2_divisions": 3}, "is not a power of two"),
        ({"backend": "cudaMallocAsync", "expandable_segments": True}, "has no effect with memory.alloc.backend"),
    ],
)
def test_bad_fields(fields, says):
    with pytest.raises(UserError, match=says):
        AllocFields(**fields)


def test_text_and_fields_together_are_refused():
    with pytest.raises(UserError, match="are both set: use one of the two"):
        Resident(alloc_conf=ARTICLE, alloc=AllocFields(expandable_segments=True))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(UserError, match=r"memory\.per_process_fraction="):
        Resident(per_process_fraction=fraction)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cuda:1"])
def test_one_model_on_several_gpus_is_refused_with_the_way_to_use_them(device_map):
    with pytest.raises(UserError, match=r"slower than one.*CUDA_VISIBLE_DEVICES=0 prompts.shard=1/2"):
        Resident(device_map=device_map)


def test_device_map_names_the_loading_path():
    assert Resident(device_map="cpu").loads_through_host()
    assert not Resident(device_map="cuda", loading=Loading.cpu_then_gpu).loads_through_host()
    assert not Resident().loads_through_host()
    assert SequentialOffload().loads_through_host()


def test_exported_under_both_names_without_importing_torch():
    code = (
        "import os, sys; from zimage_runner.memory.policies import Resident;"
        f"Resident(alloc_conf={ARTICLE!r}).apply_environment();"
        "assert 'torch' not in sys.modules;"
        f"print(*[os.environ[v] for v in {VARIABLES}], sep='\\n')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, encoding="utf-8"
    )
    assert done.stdout.split() == [ARTICLE, ARTICLE]


def test_too_late_is_said_and_changes_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True)))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with caplog.at_level(logging.WARNING):
        Resident(alloc_conf=ARTICLE).apply_environment()
    assert "has no effect: torch's CUDA allocator is already initialised" in caplog.text
    assert not any(variable in os.environ for variable in VARIABLES)


def test_the_same_value_again_is_no_news(monkeypatch, caplog):
    """The second job of a multirun finds what the first one exported."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True)))
    monkeypatch.setenv(VARIABLES[0], ARTICLE)
    Resident(alloc_conf=ARTICLE).apply_environment()
    assert not caplog.text


def test_null_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True")
    Resident().apply_environment()
    assert os.environ[VARIABLES[0]] == "expandable_segments:True"
