"""On a GPU: placements, compile modes and attention backends draw the same pictures; limits and readings are real."""

from __future__ import annotations

import pytest
import torch

from tests.support.drawing import draw, largest_difference, session_config
from tests.support.free_memory import with_room
from zimage_runner.compile import CompileMode, Full, Regional
from zimage_runner.engines.diffusers.attention import BACKENDS, this_machine, why_not
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native import engine as native_engine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.memory.policies import (
    Auto,
    GroupOffload,
    Loading,
    Memory,
    ModelOffload,
    OffloadType,
    Resident,
    SequentialOffload,
    Staged,
    Streamed,
)
from zimage_runner.memory.readings import gpu_memory
from zimage_runner.model import Device
from zimage_runner.session import Session

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


@pytest.mark.parametrize("kind", [Resident, Staged, Streamed])
def test_auto(kind, monkeypatch):
    engine = NativeEngine(batch_size=2, device=Device.cuda)
    expected = draw(Resident(), engine=engine)
    asked = with_room(monkeypatch, native_engine, kind)
    assert draw(Auto(), engine=engine) == expected
    assert asked == [Auto()]


def test_auto_reads_the_free_memory():
    session = Session(session_config(NativeEngine(device=Device.cuda), Auto()), [])
    session.start()
    assert session.report()["placement"] == "resident"  # 0.8 GB are free on whatever runs this
    session.close()
    limited = Auto(per_process_fraction=1e8 / torch.cuda.mem_get_info()[1])
    session = Session(session_config(NativeEngine(device=Device.cuda), limited), [], [("a red apple", 512)])
    try:
        session.start()
        assert session.report()["placement"] == "streamed"
        assert "streamed itself needs" in session.report()["placement_why"]
    finally:
        session.close()
        torch.cuda.set_per_process_memory_fraction(1.0)


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
