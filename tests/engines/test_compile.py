"""Compile options: labels, refusals, the persistent cache; and on nano, the same pictures (slow: Inductor's C++)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.drawing import draw, largest_difference
from zimage_runner.compile import CACHE_VARIABLES, CompileMode, Full, NoCompile, Regional
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.request import Needs
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import GroupOffload, ModelOffload, Resident, SequentialOffload, Staged
from zimage_runner.model import Model, Source
from zimage_runner.weights.cache import code_folder, trusted_folder

MODEL = Model(name="nano", source=Source.embedded)


def test_labels_tell_apart_what_rounds_differently():
    labels = {
        NoCompile().label, Regional().label, Full().label, Regional(vae=True).label,
        Regional(mode=CompileMode["max-autotune"]).label, Full(mode=CompileMode["reduce-overhead"]).label,
    }  # fmt: skip
    assert len(labels) == 6
    assert NoCompile().label == "none"
    assert not NoCompile().active


@pytest.mark.parametrize("kind", [Regional, Full])
def test_the_articles_unet_is_refused_with_the_corrected_option(kind):
    with pytest.raises(UserError, match=r"has no unet.*compile.target=transformer.*\+experiment=article"):
        kind(target="unet")
    with pytest.raises(UserError, match=r"compile.target=vae: use transformer; compile.vae=true"):
        kind(target="vae")


@pytest.mark.parametrize("memory", [SequentialOffload(), GroupOffload()])
def test_offloading_hooks_cannot_be_compiled(memory):
    with pytest.raises(UserError, match=rf"memory={memory.placement} .* compile=full cannot capture.*compile=none"):
        DiffusersEngine().check(Needs(model=MODEL, memory=memory, compile=Full()))


@pytest.mark.parametrize("memory", [Resident(), Staged(), ModelOffload()])
def test_other_placements_can(memory):
    DiffusersEngine().check(Needs(model=MODEL, memory=memory, compile=Regional()))


def test_cache_lies_in_the_runners_cache_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    for variable in CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path))
    NoCompile().apply_environment()
    assert not any(variable in os.environ for variable in CACHE_VARIABLES)
    Regional().apply_environment()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(code_folder("compiled") / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(code_folder("compiled") / "triton")
    Full(cache_dir="/elsewhere").apply_environment()  # exported already: the first one stays
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(code_folder("compiled") / "inductor")


@pytest.mark.parametrize("whose", ["cache", "cache_dir"])
def test_a_cache_that_others_may_write_to_is_not_used(whose, monkeypatch, tmp_path, caplog):
    for variable in CACHE_VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back afterwards
        monkeypatch.delenv(variable)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(shared))
    for _ in range(2):
        Regional(cache_dir=str(shared / "code") if whose == "cache_dir" else None).apply_environment()
    assert caplog.text.count("compiled code is not kept in") == 1
    for variable in CACHE_VARIABLES:
        assert trusted_folder(Path(os.environ[variable]).parent)
        assert not Path(os.environ[variable]).is_relative_to(shared)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize(
    "compile",
    [Regional(), Full(), Full(mode=CompileMode["reduce-overhead"]), Regional(vae=True)],
    ids=lambda c: c.label,
)
def test_compiled_pictures_equal_eager_ones_to_rounding(compile):
    """fullgraph=True throughout, the whole transformer included: a graph break would be an error."""
    assert largest_difference(draw(Resident(), compile=compile), draw(Resident())) <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("compile", [Regional(), Full()], ids=lambda c: c.label)
def test_prompts_of_any_length_share_the_compiled_code(compile):
    """Two prompts of 8 and 27 tokens: ``full`` compiles one graph, ``regional`` one for each of its two block lists."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    draw(Resident(), compile=compile)
    assert counters["stats"]["unique_graphs"] == (1 if isinstance(compile, Full) else 2)
