"""On a GPU: placements, compile modes and attention backends draw the same pictures; limits and readings are real."""

from __future__ import annotations

import pytest
import torch

from tests.support.drawing import difference, draw, session_config
from tests.support.free_memory import with_room
from zimage_runner.compile import CompileMode, Full, Regional
from zimage_runner.engines.diffusers.attention import BACKENDS, this_machine, why_not
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native import engine as native_engine
from zimage_runner.engines.native import text_encoder
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

ROUNDING = 1.5
"""Of 255, root of the mean square: other kernels for the same bfloat16 sums. A bfloat16 picture is 0.7 to 0.8 from the
float32 one, so that two of them are about 1.1 apart (0.82 to 1.09 were measured, a third step 15.6). The largest
difference of a pixel, 17 to 21, changes from one compilation to the next: the compiler times kernels to choose them."""


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
    assert difference(on_gpu(Resident(), name), resident) <= ROUNDING


@pytest.mark.parametrize(
    "compile",
    [Regional(), Full(), *(kind(mode=CompileMode["reduce-overhead"]) for kind in (Regional, Full))],
    ids=lambda c: c.label,
)
def test_compiled(compile, resident):
    assert difference(on_gpu(Resident(), compile=compile), resident) <= ROUNDING


def test_readings_are_there():
    on_gpu(Resident())
    assert gpu_memory()["peak_reserved_gb"] > 0


@pytest.mark.parametrize("tokens", [5, 9, 64, 127, 129, 511])
def test_tokens_behind_a_caption_change_no_bit(tokens, monkeypatch):
    """With heads of the published size, which cuDNN's attention takes."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    attention = random_attention(generator)
    h = torch.randn(1, tokens, 256, device="cuda", dtype=torch.bfloat16, generator=generator)
    turns = text_encoder.TextEncoder(CAPTION_ENCODER).rotary(tokens).cuda()
    filled = attention(h, turns)
    monkeypatch.setattr(text_encoder, "tokens_to_add", lambda tokens, device: 0)
    assert torch.equal(filled, attention(h, turns))


CAPTION_ENCODER = text_encoder.TextEncoderConfig(
    vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
)  # fmt: skip


def random_attention(generator: torch.Generator) -> text_encoder.Qwen3Attention:
    attention = text_encoder.Qwen3Attention(CAPTION_ENCODER)
    for name, parameter in attention.named_parameters():
        kind = torch.float32 if "norm" in name else torch.bfloat16
        values = torch.randn(parameter.shape, device="cuda", generator=generator) / 16
        parameter.data = (values + 1 if "norm" in name else values).to(kind)
    return attention.requires_grad_(False)
