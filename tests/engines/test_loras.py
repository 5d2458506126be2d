"""Adapters in the engines: pictures of the merged weights, undone to the last bit, in every precision and placement."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import NANO, engines
from tests.support import loras as support
from tests.support.adapter_layouts import ATTENTION, FEED_FORWARD, layouts
from tests.support.drawing import SMALL, items, session_config
from tests.support.reference import noise
from zimage_runner.compile import NoCompile
from zimage_runner.engines import originals
from zimage_runner.engines.base import EngineConfig
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.merging import Adapters, Component, Slot, together
from zimage_runner.engines.native import images
from zimage_runner.engines.native.adapted import adapted_transformer
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.originals import Originals
from zimage_runner.engines.request import Needs
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.memory.policies import GroupOffload, Memory, Resident, SequentialOffload, Staged, Streamed
from zimage_runner.sampling import Lora
from zimage_runner.session import Session
from zimage_runner.weights.adapters.adapter import Delta
from zimage_runner.weights.adapters.changes import Difference, LowRank
from zimage_runner.weights.adapters.reader import read_adapter

FP8 = torch.float8_e4m3fn
PARAMS = replace(engines.PARAMS, height=64, width=64, num_inference_steps=1)
CONFIGS: list[EngineConfig] = [NativeEngine(), DiffusersEngine()]


@pytest.fixture(scope="module", params=CONFIGS, ids=["native", "diffusers"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = engines.create(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the known change in its weights."""
    return support.merged_checkpoint(tmp_path_factory.mktemp("merged") / "nano", support.known())


def draw(engine: Any, *loras: Lora) -> np.ndarray:
    engine.adapt(loras)
    return engines.picture(engine, PARAMS)


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_pictures_are_those_of_the_merged_checkpoint(engine: Any, merged: Path, tmp_path: Path) -> None:
    file = hashlib.sha256((NANO / support.TRANSFORMER).read_bytes()).hexdigest()
    other = engines.create(CONFIGS[0] if engine.name == "native" else CONFIGS[1], merged)
    expected, plain = engines.picture(other, PARAMS), draw(engine)
    other.close()
    assert largest_difference(expected, plain) > 30
    exact = support.lora(support.written(tmp_path / "full.safetensors", support.full_difference(support.known())))
    assert np.array_equal(draw(engine, exact), expected)
    for layout in ("ai-toolkit", "kohya fused", "DoRA LyCORIS"):  # all of them: test_adapter_layouts.py
        write, modules = layouts({n: w.float() for n, w in support.stored().items()})[layout]
        change, rest = support.known().only(*modules, blocks=support.BLOCKS), {}
        for module in support.known().up.keys() - change.up.keys():  # what such files do not hold
            rest[f"diffusion_model.{module}.diff"] = support.known().difference(module)
        pair = [support.lora(support.written(tmp_path / f"{layout}.safetensors", *write(change)))]
        if rest:
            pair.append(support.lora(support.written(tmp_path / f"{layout}, rest.safetensors", rest)))
        assert largest_difference(draw(engine, *pair), expected) <= 1, layout
    assert np.array_equal(draw(engine), plain)
    assert hashlib.sha256((NANO / support.TRANSFORMER).read_bytes()).hexdigest() == file


def test_changing_from_one_to_another_leaves_nothing_behind(engine: Any, tmp_path: Path) -> None:
    whole, part = support.known(), support.known(2).only(*ATTENTION, blocks=support.BLOCKS)
    a, b = (
        support.lora(support.written(tmp_path / f"{name}.safetensors", support.low_rank(change)), weight)
        for name, change, weight in (("a", whole, 0.7), ("b", part, -0.5))
    )
    plain, only_a, only_b = draw(engine), draw(engine, a), draw(engine, b)
    both = draw(engine, a, b)
    assert not np.array_equal(only_a, only_b)
    assert not np.array_equal(both, only_a)
    assert np.array_equal(draw(engine, b), only_b)
    assert np.array_equal(draw(engine), plain)
    assert np.array_equal(draw(engine, a), only_a)
    assert not engine.adapt([a])  # nothing to do
    assert np.array_equal(draw(engine), plain)


def weights_of(model: NativeModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    pairs = [(tensor.contiguous(), other[name].contiguous()) for name, tensor in one.items()]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize(("precision", "streamed"), [("fp8", False), ("int8", True), ("bf16", True)])
def test_weights_are_merged_before_they_are_rounded_to_eight_bits(
    precision: str, streamed: bool, merged: Path, tmp_path: Path
) -> None:
    options = Options(precision=precision, streamed=streamed)
    model, expected = load_model(NANO, options), load_model(merged, options)
    before, target = weights_of(model), weights_of(expected)
    assert not same_bits(before, target)
    adapters = Adapters()
    adapters.attach(adapted_transformer(model, NANO / "transformer"))
    embeds, latents = model.encode(["a red fox"], 512), noise(1, 64, 64)
    plain = model.denoise(embeds, latents, 1)
    exact = support.written(tmp_path / "full.safetensors", support.full_difference(support.known()))
    places = {name: parameter.data_ptr() for name, parameter in model.transformer.named_parameters()}
    adapters.want([support.lora(exact)])
    # Where they were: recorded graphs and compiled code have the addresses.
    assert {name: parameter.data_ptr() for name, parameter in model.transformer.named_parameters()} == places
    assert same_bits(weights_of(model), target)
    assert torch.equal(model.denoise(embeds, latents, 1), expected.denoise(embeds, latents, 1))
    adapters.want([])
    assert same_bits(weights_of(model), before)
    assert torch.equal(model.denoise(embeds, latents, 1), plain)


def test_changes_that_have_tensors_in_common_are_made_together() -> None:
    def step(*tensors: str) -> tuple[Delta, float]:
        return Delta("transformer", tensors, Difference(torch.zeros(1)), "m"), 1.0

    a, qkv, k, b, ab = step("a"), step("q", "k", "v"), step("k"), step("b"), step("a", "b")
    assert together([a, qkv, b, k]) == [[a], [qkv, k], [b]]
    assert together([a, b, k, ab, qkv]) == [[a, b, ab], [k, qkv]]


def test_the_sum_is_rounded_once() -> None:
    """bfloat16 has 8 bits: of two changes that are too small to show alone, the sum shows."""
    linear = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    linear.weight.data.fill_(1.0)
    component = Component("transformer", {"w": Slot(linear, "weight")}, torch.device("cpu"))
    small = Delta("transformer", ("w",), LowRank(torch.ones(1, 1), torch.full((2, 1), 3 * 2**-10), 1.0), "w")
    adapter: Any = type("A", (), {"of": lambda self, name: [small]})()
    component.merge([(adapter, 1.0)])
    assert linear.weight.data.flatten().tolist() == [1.0, 1.0]
    component.merge([(adapter, 1.0), (adapter, 1.0)])
    assert linear.weight.data.flatten().tolist() == [1.0078125, 1.0078125]
    component.merge([])
    assert linear.weight.data.flatten().tolist() == [1.0, 1.0]


def test_a_merge_that_failed_is_made_again(tmp_path: Path) -> None:
    model = load_model(NANO, Options())
    before = weights_of(model)
    component, adapters = adapted_transformer(model, NANO / "transformer"), Adapters()
    adapters.attach(component)
    lora = support.lora(support.written(tmp_path / "a.safetensors", support.low_rank(support.known())))
    change, calls = component._change, []

    def failing(steps: Any) -> None:
        calls.append(steps)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        change(steps)

    component._change = failing  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(torch.OutOfMemoryError):
        adapters.want([lora])
    adapters.want([lora])
    after = weights_of(model)
    other = load_model(NANO, Options())
    again = Adapters()
    again.attach(adapted_transformer(other, NANO / "transformer"))
    again.want([lora])
    assert same_bits(after, weights_of(other))
    adapters.want([])
    assert same_bits(weights_of(model), before)


def test_a_file_that_is_another_one_now_stops_the_run(tmp_path: Path) -> None:
    path = support.written(tmp_path / "a.safetensors", support.low_rank(support.known()))
    lora, adapters = support.lora(path), Adapters()
    adapters.attach(adapted_transformer(load_model(NANO, Options()), NANO / "transformer"))
    support.written(path, support.low_rank(support.known(2)))
    with pytest.raises(RunStopped, match=r"a\.safetensors has changed since this run was planned"):
        adapters.want([lora])
    path.unlink()
    with pytest.raises(RunStopped, match="cannot be read any more"):
        adapters.want([lora])


@pytest.mark.parametrize("config", CONFIGS, ids=["native", "diffusers"])
def test_adapters_of_the_text_encoder_change_captions_alone(config: EngineConfig, tmp_path: Path) -> None:
    engine = engines.create(config)
    lora = support.lora(support.written(tmp_path / "te.safetensors", support.text_encoder_adapter()))
    assert lora.encodes
    module = (engine.model if config is CONFIGS[0] else engine.pipe).transformer
    weights = {name: parameter.clone() for name, parameter in module.named_parameters()}
    (plain,) = engine.encode(["a red apple"], 512)
    engine.adapt([lora])
    (changed,) = engine.encode(["a red apple"], 512)
    assert not torch.allclose(plain, changed, atol=1e-2)
    assert all(torch.equal(weights[name], parameter) for name, parameter in module.named_parameters())
    engine.adapt([])
    assert torch.equal(engine.encode(["a red apple"], 512)[0], plain)
    engine.close()


@pytest.mark.parametrize("memory", [Resident(), Staged()], ids=["resident", "staged"])
def test_a_session_draws_each_item_with_its_own(memory: Memory, tmp_path: Path) -> None:
    """Also where all captions are encoded before the transformer is there, and where the encoder is changed too."""
    style = support.lora(support.written(tmp_path / "style.safetensors", support.low_rank(support.known())), 0.5)
    words = support.lora(support.written(tmp_path / "words.safetensors", support.text_encoder_adapter()))
    sets: list[tuple[Lora, ...]] = [(), (style,), (words,), (style, words)]
    drawn = {}
    for name, order in (("forth", sets), ("back", [*sets[::-1], ()])):
        batches = [items(1, replace(SMALL, loras=loras)) for loras in order]
        texts = [("a red apple", 512, *batch[0].params.encoder_loras) for batch in batches]
        session = Session(session_config(NativeEngine(), memory), [], texts)
        session.start()
        try:
            drawn[name] = {batch[0].params.loras: session.generate(batch).images.wait().tobytes() for batch in batches}
        finally:
            session.close()
    assert drawn["forth"] == drawn["back"]
    assert len(set(drawn["forth"].values())) == len(sets)


@pytest.mark.parametrize(
    ("config", "memory", "encoder", "message"),
    [
        (NativeEngine(), Streamed(), True, "memory=streamed reads the text encoder's layers from their files"),
        (DiffusersEngine(), SequentialOffload(), False, "memory=sequential_offload keeps copies of the weights"),
        (DiffusersEngine(), GroupOffload(), False, "memory=group_offload keeps copies of the weights"),
        (NativeEngine(), Streamed(), False, None),
        (DiffusersEngine(), Staged(), True, None),
    ],
)
def test_what_cannot_be_is_refused(config: EngineConfig, memory: Memory, encoder: bool, message: str | None) -> None:
    lora = Lora(digest="d", weight=1.0, name="a", path="a", hash="h", encodes=encoder)
    plain = Needs.of(engines.MODEL, memory, NoCompile(), [SMALL])
    needs = Needs.of(engines.MODEL, memory, NoCompile(), [SMALL, replace(SMALL, loras=(lora,))])
    config.check(plain)
    if message is None:
        config.check(needs)
        return
    with pytest.raises(UserError, match=message):
        config.check(needs)


def test_the_adapters_reader_and_the_plan_agree(tmp_path: Path) -> None:
    path = support.written(tmp_path / "a.safetensors", support.low_rank(support.known()))
    changed = {name for delta in read_adapter(path).deltas for name in delta.tensors}
    assert changed == {f"{module}.weight" for module in support.known().up}
    assert {f"layers.0.{module}.weight" for module in FEED_FORWARD} <= changed


def test_originals_go_to_the_host_where_the_gpu_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the GPU's place: what is kept is copied into page-locked blocks, side by side."""
    kept = Originals(torch.device("cpu"))
    monkeypatch.setattr(originals, "BLOCK", 1024)
    monkeypatch.setattr(images, "page_locked", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    tensors = {f"{n}": torch.randn(n, 7).to(dtype) for n, dtype in ((3, torch.bfloat16), (60, torch.float32), (1, FP8))}
    with torch.inference_mode():
        copies = {name: kept._copy(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert copies[name].dtype == tensor.dtype
            assert torch.equal(copies[name].view(torch.uint8), tensor.view(torch.uint8))
        kept.keep("a", lambda: [tensors["3"]])
        kept.keep("a", lambda: pytest.fail("kept already"))
    assert not kept.to_host()  # nothing is on a GPU
    assert torch.equal(kept.of("a")[0], tensors["3"])
