"""On a GPU: placements, compile modes and attention backends draw the same pictures; limits and readings are real."""

from __future__ import annotations

import pytest
import torch

from tests.support.drawing import draw, largest_difference
from zimage_runner.compile import CompileMode, Full, Regional
from zimage_runner.engines.diffusers.attention import BACKENDS, this_machine, why_not
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.memory.policies import (
    GroupOffload,
    Loading,
    Memory,
    ModelOffload,
    OffloadType,
    Resident,
    SequentialOffload,
    Staged,
)
from zimage_runner.memory.readings import gpu_memory
from zimage_runner.model import Device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

PLACEMENTS = {
    "staged": Staged,
    "model_offload": ModelOffload,
    "sequential_offload": SequentialOffload,
    "group_offload": GroupOffload,
    "group_offload_pinning_late": lambda: GroupOffload(low_cpu_mem_usage_pinning=True),
    "group_offload_leaves": lambda: GroupOffload(offload_type=OffloadType.leaf_level),
    "cpu_then_gpu": lambda: Resident(loading=Loading.cpu_then_gpu),
    "as_the_article_loads": lambda: Resident(device_map="cpu"),
}

ROUNDING = 24
"""Of 255. Other kernels for the same bfloat16 sums; eight steps let one rounding grow."""


def on_gpu(memory: Memory, attention: str = "native", **options) -> dict[str, bytes]:
    engine = DiffusersEngine(batch_size=2, device=Device.cuda, attention=attention)
    return draw(memory, engine=engine, **options)


@pytest.fixture(scope="module")
def resident() -> dict[str, bytes]:
    return on_gpu(Resident())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement(name, resident):
    assert on_gpu(PLACEMENTS[name]()) == resident


@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("native", "sage")])
def test_attention(name, resident):
    reason = why_not(name, this_machine("cuda", "bfloat16"))
    if reason:
        pytest.skip(reason)
    assert largest_difference(on_gpu(Resident(), name), resident) <= ROUNDING


@pytest.mark.parametrize(
    "compile",
    [Regional(), Full(), *(kind(mode=CompileMode["reduce-overhead"]) for kind in (Regional, Full))],
    ids=lambda c: c.label,
)
def test_compiled(compile, resident):
    assert largest_difference(on_gpu(Resident(), compile=compile), resident) <= ROUNDING


def test_readings_are_there():
    on_gpu(Resident())
    assert gpu_memory()["peak_reserved_gb"] > 0
