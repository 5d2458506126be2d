"""What the first picture needs is used beforehand, once, and nothing that anybody sees changes by it."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.drawing import NANO, PARAMS, session_config
from tests.native.conftest import CHECKPOINT, captions, noise
from tests.native.test_travelling import OPTIONS, driver, travelling  # noqa: F401 (fixtures)
from zimage_runner.engines.base import DenoiseRequest, Device, LoadRequest
from zimage_runner.engines.native import attention as attention_module
from zimage_runner.engines.native import engine as engine_module
from zimage_runner.engines.native import preheat
from zimage_runner.engines.native.attention import SDPA_BACKENDS, Attention, plain_attention, unswitched
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.model import NativeModel
from zimage_runner.engines.native.preheat import PREHEAT, Preheat, lend, miniature
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.errors import UserError
from zimage_runner.memory import Resident
from zimage_runner.session import Session
from zimage_runner.warmup import Generate, NoWarmup, Warmup, WarmupShape
from zimage_runner.weights import source

SHAPE = WarmupShape(params=PARAMS, caption_tokens=32)
GUIDED = replace(SHAPE, params=replace(PARAMS, guidance_scale=3.0, negative_prompt="blurry"), batch_size=2)
MEMORY = 64 << 20


@pytest.fixture(autouse=True)
def first_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preheat, "_begun", False)


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREHEAT, "1")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was preheated, and what went wrong."""
    caplog.set_level(logging.DEBUG, logger=preheat.__name__)
    ours = ("preheat: ", "not preheated: ")
    return lambda: [m.removeprefix(ours[0]).partition(" after ")[0] for m in caplog.messages if m.startswith(ours)]


def draw(engine: NativeEngineAdapter) -> tuple[list[torch.Tensor], torch.Tensor, np.ndarray]:
    embeds = engine.encode(["a red apple", "一只猫"], 512)
    request = DenoiseRequest(
        prompt_embeds=embeds, negative_prompt_embeds=None, noise=noise(2, 128, 128), params=PARAMS
    )  # fmt: skip
    latents = engine.denoise(request)
    return embeds, latents, engine.decode(latents).wait()


@pytest.mark.parametrize("encodes", [True, False])
@pytest.mark.parametrize("switch", ["1", "thread"])
def test_every_result_is_the_same(travelling, monkeypatch, told, encodes, switch) -> None:  # noqa: F811
    expected = draw(NativeEngineAdapter(travelling(), OPTIONS, False, encodes))
    assert told() == []
    monkeypatch.setenv(PREHEAT, switch)
    in_threads: list[bool] = []
    monkeypatch.setattr(preheat, "preheat_transformer", in_which_thread(in_threads))
    before = torch.get_rng_state()
    engine = NativeEngineAdapter(travelling(), OPTIONS, False, encodes, GUIDED)
    got = draw(engine)
    assert [name for name in told() if name != "text encoder"] == ["transformer", "done"]
    assert in_threads == [encodes or switch == "thread"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], got[0]))
    assert torch.equal(expected[1], got[1])
    assert (expected[2] == got[2]).all()


def in_which_thread(seen: list[bool]) -> Callable[..., None]:
    work = preheat.preheat_transformer

    def noted(*args: Any) -> None:
        seen.append(threading.current_thread() is not threading.main_thread())
        work(*args)

    return noted


class Calls(TorchDispatchMode):
    """Every operator that is called, with the shapes and types that kernels and plans are chosen by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.seen.add((str(func), *((tuple(t.shape), t.stride(), t.dtype) for t in tensors)))
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], Any]) -> set[Any]:
    with Calls() as calls:
        call()
    return calls.seen


def lent(native: NativeModel, byte: int = 0) -> tuple[NativeModel, torch.Tensor]:
    memory = torch.full((MEMORY,), byte, dtype=torch.uint8)
    small = miniature(native, switches=True)
    lend(small, memory)
    return small, memory


@pytest.mark.parametrize("shape", [SHAPE, GUIDED, replace(GUIDED, negative_caption_tokens=64)])
def test_it_calls_all_that_the_first_picture_calls(native, shape) -> None:
    small, _ = lent(native)
    got = operators(lambda: preheat.preheat_encoder(small, shape))
    assert operators(lambda: native.encode_ids([5] * 31)) <= got
    got = operators(lambda: preheat.preheat_transformer(small, shape))
    texts = captions(31, seed=1) * shape.batch_size
    scale = shape.params.guidance_scale
    negatives = captions(max(shape.negative_caption_tokens, 32) - 1, seed=2) * shape.batch_size if scale else None
    latents = noise(shape.batch_size, 128, 128)
    native.forget()
    missing = operators(lambda: native.denoise(texts, latents, 1, Guidance(scale=scale), negatives)) - got
    # What has all modulated layers' vectors in one tensor is as large as there are layers.
    config = native.description.transformer
    modulated = config.n_layers + config.n_refiner_layers
    assert modulated > 3
    assert [call for call in missing if call[1][0][0] not in (modulated, 4 * modulated)] == []


def test_nothing_of_the_model_or_of_the_memory_changes(native, monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the tokenizer's settings are the other thread's")

    native.forget()
    small, memory = lent(native, byte=0xFF)  # NaN in every type
    monkeypatch.setattr(CaptionTokenizer, "__call__", refuse)
    before, known = memory.clone(), set(native._rehearsals._known)
    preheat.preheat_encoder(small, GUIDED)
    preheat.preheat_transformer(small, GUIDED)
    assert torch.equal(memory, before)
    assert not len(native._captions)
    assert not native.graphs._seen
    assert native._rehearsals._known == known
    assert native._tables.cache_info().currsize == native._steps.cache_info().currsize == 0
    preheat.dismantle(small)
    assert not hasattr(small, "transformer")
    assert not hasattr(small, "text_encoder")


@settings(max_examples=30, deadline=None)
@given(more=st.integers(-4096, 4 << 20), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_parameters_are_pieces_of_the_memory(native, more: int, dtype: torch.dtype) -> None:
    small = miniature(replace_dtype(native, dtype), switches=True)
    modules = (small.text_encoder, small.transformer)
    size = more + max(p.numel() * kind(n, dtype).itemsize for m in modules for n, p in m.named_parameters())
    memory = torch.empty(size, dtype=torch.uint8)
    if more < 0:
        with pytest.raises(ValueError, match="more than the"):
            lend(small, memory)
        return
    lend(small, memory)
    begin = memory.data_ptr()
    for module in modules:
        for name, parameter in module.named_parameters():
            assert parameter.dtype == kind(name, dtype)
            assert (parameter.data_ptr() - begin) % preheat.ALIGNMENT == 0
            assert begin <= parameter.data_ptr() <= begin + size - parameter.nbytes


def kind(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if preheat.FLOAT32.match(name) else dtype


def replace_dtype(native: NativeModel, dtype: torch.dtype) -> Any:
    parts = {name: getattr(native, name) for name in ("description", "tokenizer", "attention")}
    return SimpleNamespace(**parts, options=replace(native.options, dtype=dtype))


class Trouble(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Trouble("no plan"), torch.OutOfMemoryError("CUDA out of memory"), ValueError("shape"), MemoryError()]
)
@pytest.mark.parametrize("encodes", [True, False])
def test_an_error_in_it_is_logged_and_forgotten(travelling, monkeypatch, switched_on, told, error, encodes) -> None:  # noqa: F811
    def fail(*_: Any) -> None:
        raise error

    expected = draw(NativeEngineAdapter(travelling(), OPTIONS, False, encodes))
    monkeypatch.setattr(preheat, "preheat_transformer", fail)
    got = draw(NativeEngineAdapter(travelling(), OPTIONS, False, encodes, SHAPE))
    assert torch.equal(expected[1], got[1])
    said = [message for message in told() if message != "text encoder"]
    assert len(said) == 2
    assert said[0].startswith("not preheated: ")
    assert str(error) in said[0]


def test_nor_does_an_error_before_it(travelling, monkeypatch, switched_on, told) -> None:  # noqa: F811
    def fail(*_: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(source.WeightsSource, "arriving", fail)
    draw(NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE))
    assert told() == ["not preheated: RuntimeError: no such device"]


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_is_given_back_where_it_is_safe(monkeypatch, error) -> None:
    done: list[tuple[str, str]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: done.append((what, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", note("cache"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", note("cuBLAS"), raising=False)

    def work(_: Preheat) -> None:
        if error is not None:
            raise error

    run = Preheat(work)
    run.wait()
    run.wait()
    main = ("cuBLAS", threading.main_thread().name)
    assert done == ([main] if error is None else [("cache", "preheat"), main])


@contextlib.contextmanager
def slow_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Preheating that ends a while after it is waited for; what happened, in order."""
    release, events, wait = threading.Event(), [], Preheat.wait

    def work(*_: Any) -> None:
        release.wait(20)
        time.sleep(0.05)
        events.append("preheated")

    def released(self: Preheat) -> None:
        release.set()
        wait(self)

    monkeypatch.setattr(preheat, "preheat_transformer", work)
    monkeypatch.setattr(Preheat, "wait", released)
    try:
        yield events
    finally:
        release.set()


@pytest.mark.parametrize(
    ("call", "first_effect"),
    [
        (lambda engine: engine.denoise(SimpleNamespace(params=PARAMS, **ANY)), "denoise"),
        (lambda engine: engine.decode(None), "decode"),
        (lambda engine: engine.decode_carefully(None), "decode"),
        (lambda engine: engine.free_memory(), "forget"),
        (lambda engine: engine.close(), "forget"),
    ],
    ids=["denoise", "decode", "decode_carefully", "free_memory", "close"],
)
def test_it_is_over_before_anything_is_recorded_or_freed(
    travelling, monkeypatch, switched_on, call, first_effect  # noqa: F811
) -> None:  # fmt: skip
    with slow_work(monkeypatch) as events:
        engine = NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE)
        assert events == []
        monkeypatch.setattr(engine.model, first_effect, lambda *_, **__: events.append(first_effect))
        monkeypatch.setattr(engine.model.graphs, "give_up", lambda: events.append("give up"))
        monkeypatch.setattr(engine_module, "NativePending", lambda pending: pending)
        call(engine)
        assert events[0] == "preheated"
        assert first_effect in events


ANY = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds", "noise"))


def test_captions_are_encoded_beside_it(travelling, monkeypatch, switched_on) -> None:  # noqa: F811
    with slow_work(monkeypatch) as events:
        engine = NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE)
        assert len(engine.encode(["a red apple"], 512)) == 1
        assert events == []
        engine.close()
    assert events == ["preheated"]


def test_a_checkpoint_that_is_refused_does_not_leave_it_behind(travelling, monkeypatch, switched_on) -> None:  # noqa: F811
    def refuse(*_: Any) -> None:
        raise UserError("not this one")

    monkeypatch.setattr(engine_module, "load_text_encoder", refuse)
    with slow_work(monkeypatch) as events:
        with pytest.raises(UserError, match="not this one"):
            NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE)
        assert events == ["preheated"]


def test_once_in_a_process(travelling, switched_on, told) -> None:  # noqa: F811
    for _ in range(2):
        NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE).close()
    assert told().count("transformer") == 1


@pytest.mark.parametrize(
    ("switch", "shape", "travels"),
    [("", SHAPE, True), ("0", SHAPE, True), ("1", None, True), ("1", SHAPE, False)],
    ids=["by default", "switched off", "nothing to draw is known", "weights that are read when asked for"],
)
@pytest.mark.parametrize("staged", [False, True])
def test_where_it_does_not_pay(travelling, monkeypatch, told, switch, shape, travels, staged) -> None:  # noqa: F811
    if switch:
        monkeypatch.setenv(PREHEAT, switch)
    else:
        monkeypatch.delenv(PREHEAT, raising=False)
    weights = travelling()
    if not travels:
        weights = source.WeightsSource(weights._checkpoint, weights._model, None, None)
    NativeEngineAdapter(weights, OPTIONS, staged, not staged, shape).close()
    assert told() == []


def test_the_text_encoder_is_left_out_once_its_weights_are_there(travelling, monkeypatch, switched_on, told) -> None:  # noqa: F811
    for arrived, expected in ((True, ["transformer"]), (False, ["text encoder", "transformer"])):
        monkeypatch.setattr(preheat, "_begun", False)
        monkeypatch.setattr(source.WeightsSource, "has_arrived", lambda self, component, there=arrived: there)
        before = len(told())
        NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE).close()
        assert told()[before:] == [*expected, "done"]


def test_what_has_arrived(travelling) -> None:  # noqa: F811
    weights = travelling()
    memory = weights.arriving()
    sizes = [load.nbytes for load in weights._preload._all]
    assert memory is not None
    assert len(memory) == max(sizes)
    for component in ("text_encoder", "transformer", "vae"):
        weights.tensors(component)
    assert weights.arriving() is None
    assert weights.has_arrived("transformer")
    weights.settle("cpu", "float32")
    assert weights.arriving() is None
    assert not weights.has_arrived("transformer")


def test_memory_is_not_kept_from_those_who_load_another_way(travelling, monkeypatch, switched_on, told) -> None:  # noqa: F811
    monkeypatch.setenv("FAKE_CUDA_FAIL_AFTER", "0")
    weights = travelling()
    weights._preload._opener.join()
    for reader in weights._preload._readers:
        reader.join()
    assert weights.arriving() is None
    engine = SimpleNamespace(ops=preheat.torch_ops)
    preheat.begin(engine, weights, SHAPE, True).wait()  # pyright: ignore
    assert told() == []


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ({}, True),
        ({"dim": 3840, "n_heads": 30}, True),
        ({"dim": 5120, "n_heads": 40}, False),
        ({"dim": 3840, "n_heads": 60}, False),
        ({"dim": 2048, "n_heads": 16}, False),
    ],
)
def test_not_where_kernels_would_have_to_be_compiled(native, widths, expected) -> None:
    data = (preheat.prebuilt.FOLDER / "sm_90.bin").read_bytes()
    kernels = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["kernels"]
    description = native.description
    changed = replace(description, transformer=replace(description.transformer, **widths))
    assert preheat.has_widths(kernels, changed) == expected


def test_on_the_cpu_there_is_none(switched_on, told) -> None:
    session = Session(session_config(NativeEngine(device=Device.cpu), Resident()), [SHAPE])
    session.start()
    session.close()
    assert told() == []


@pytest.mark.parametrize(
    ("warmup", "shapes", "expected"),
    [(NoWarmup(), [SHAPE, GUIDED], SHAPE), (NoWarmup(), [], None), (Generate(), [SHAPE], None)],
    ids=["the first", "none", "the warm-up does it"],
)
def test_the_session_tells_the_first_shape(
    monkeypatch, warmup: Warmup, shapes: list[WarmupShape], expected: WarmupShape | None
) -> None:
    got: list[WarmupShape | None] = []

    def create(self: NativeEngine, request: LoadRequest) -> None:
        got.append(request.first_shape)
        raise Trouble

    monkeypatch.setattr(NativeEngine, "create", create)
    with pytest.raises(Trouble):
        Session(session_config(NativeEngine(), Resident(), warmup=warmup), shapes).start()
    assert got == [expected]


@pytest.mark.parametrize(("batch_size", "expected"), [(1, SHAPE), (4, SHAPE), ("auto", None)])
def test_not_while_a_pictures_memory_is_measured(monkeypatch, batch_size, expected) -> None:
    got: list[Any] = []
    monkeypatch.setattr(NativeEngineAdapter, "load", lambda *args: got.append(args[-1].first_shape))
    config = session_config(NativeEngine(device=Device.cpu, batch_size=batch_size), Resident())
    request = LoadRequest(
        checkpoint=config.checkpoint,
        model=config.model,
        memory=config.memory,
        compile=config.compile,
        first_shape=SHAPE,
    )
    config.engine.create(request)
    assert got == [expected]


@pytest.mark.parametrize("name", SDPA_BACKENDS)
def test_a_backend_called_directly(name: str) -> None:
    """On the meta device every operator checks its arguments and tells its result's shape, GPU or not."""
    attention = unswitched(Attention(name, attention_module.scaled_dot_product, lambda: pytest.fail("switches")))
    with attention.context():
        like = torch.empty(2, 64, 4, 128, device="meta", dtype=torch.bfloat16)
        assert attention.attend(like, like, like).shape == like.shape
        if name == "math":
            query, key, value = torch.randn(3, 2, 16, 4, 32, generator=torch.Generator().manual_seed(0))
            assert torch.allclose(
                attention.attend(query, key, value), plain_attention(query, key, value), atol=1e-5
            )  # fmt: skip


def test_backends_without_a_switch_are_themselves() -> None:
    attention = Attention("flash3", attention_module.scaled_dot_product)
    assert unswitched(attention) is attention


def test_only_the_thread_that_draws_switches_backends(travelling, monkeypatch, switched_on, told) -> None:  # noqa: F811
    threads: set[str] = set()

    @contextlib.contextmanager
    def switch() -> Iterator[None]:
        threads.add(threading.current_thread().name)
        yield

    attention = Attention("math", attention_module.scaled_dot_product, switch)
    monkeypatch.setattr("zimage_runner.engines.native.model.choose_attention", lambda *_: attention)
    draw(NativeEngineAdapter(travelling(), OPTIONS, False, True, SHAPE))
    assert "transformer" in told()
    assert threads == {threading.main_thread().name}


def test_a_process_that_ends_meanwhile_has_its_exit_code() -> None:
    code = """
import sys, time, torch
from zimage_runner.engines.native.preheat import Preheat
torch.set_num_threads(1)
def work(preheat):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.ones(64, 64).softmax(-1)
Preheat(work)
sys.exit(3)
"""
    root = str(NANO.parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_lean_torch_stays_lean() -> None:
    code = f"""
import sys
from zimage_runner.torch_import import import_torch_lean
torch = import_torch_lean()
from pathlib import Path
from zimage_runner.engines.native import preheat
from zimage_runner.engines.native.assembly import open_model
from zimage_runner.engines.native.model import Options
from zimage_runner.warmup import WarmupShape
from tests.drawing import PARAMS
model = open_model(Path({str(CHECKPOINT)!r}), Options())
small, shape = preheat.miniature(model, switches=False), WarmupShape(params=PARAMS, caption_tokens=32)
preheat.lend(small, torch.zeros({MEMORY}, dtype=torch.uint8))
preheat.preheat_encoder(small, shape)
preheat.preheat_transformer(small, shape)
print([name for name in ("torch._dynamo", "torch.export", "sympy", "triton") if name in sys.modules])
"""
    root = str(NANO.parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
