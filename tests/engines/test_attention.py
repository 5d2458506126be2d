"""Attention backends: refused before anything is loaded, and what auto takes where."""

from __future__ import annotations

import pytest

from zimage_runner.engines.auto import AutoEngine
from zimage_runner.engines.diffusers.attention import BACKENDS, MASKLESS, Machine, check_name, choose_backend
from zimage_runner.errors import UserError

CPU = Machine(device="cpu", dtype="float32", capability=(0, 0))
HOPPER = Machine(device="cuda", dtype="bfloat16", capability=(9, 0))
HOPPER_FP32 = Machine(device="cuda", dtype="float32", capability=(9, 0))
ADA = Machine(device="cuda", dtype="bfloat16", capability=(8, 9))
TURING = Machine(device="cuda", dtype="float16", capability=(7, 5))
BLACKWELL = Machine(device="cuda", dtype="bfloat16", capability=(10, 0))


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """As if neither flash attention nor sage attention were installed."""
    monkeypatch.setattr("zimage_runner.engines.diffusers.attention.is_installed", lambda package: False)


@pytest.fixture
def all_packages(monkeypatch):
    monkeypatch.setattr("zimage_runner.engines.diffusers.attention.is_installed", lambda package: True)


@pytest.mark.parametrize(
    ("machine", "backend"),
    [(CPU, "native"), (HOPPER, "_native_cudnn"), (HOPPER_FP32, "native"), (ADA, "native"), (TURING, "native"),
     (BLACKWELL, "_native_cudnn")],
)  # fmt: skip
def test_auto(machine, backend):
    assert choose_backend("auto", machine) == backend


@pytest.mark.usefixtures("all_packages")
@pytest.mark.parametrize(
    ("machine", "backend"), [(HOPPER, "_flash_3"), (ADA, "native"), (BLACKWELL, "_native_cudnn"), (CPU, "native")]
)
def test_auto_takes_flash_3_on_hopper_alone_and_never_a_quantising_backend(machine, backend):
    assert choose_backend("auto", machine) == backend


@pytest.mark.parametrize(
    ("name", "machine", "says"),
    [
        ("_native_cudnn", CPU, "it needs a CUDA GPU"),
        ("_native_cudnn", HOPPER_FP32, "it computes in bfloat16 and the model runs in float32"),
        ("_native_cudnn", TURING, "it needs compute capability 8.0 and this GPU has 7.5"),
        ("flash", ADA, "the package flash_attn is not installed"),
        ("_flash_3", ADA, "it is written for compute capability 9.x and this GPU has 8.x"),
        ("sage", HOPPER, "the package sageattention is not installed"),
        ("flash9", HOPPER, "no such backend"),
    ],
)
def test_refused(name, machine, says):
    with pytest.raises(UserError) as caught:
        choose_backend(name, machine)
    assert says in str(caught.value)
    assert "engine.attention=" in str(caught.value)
    assert "auto" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("flash3_fp8", "use engine=native with it, or engine.attention=auto"),
        ("_flash_3", "use engine=diffusers with it, or engine.attention=auto"),
        ("flash", "use engine=native or engine=diffusers with it"),
        ("flsh", "no engine has such a backend: use engine.attention=auto"),
    ],
)
def test_engine_auto_names_only_engines_that_have_it(name, engines):
    with pytest.raises(UserError, match=rf"engine\.attention={name}.*: {engines}"):
        AutoEngine(attention=name)


def test_names_are_known_to_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(BACKENDS) <= {backend.value for backend in AttentionBackendName}
    assert set(MASKLESS) <= set(BACKENDS)
    check_name("auto")
