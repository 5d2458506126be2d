"""memory=auto: what is taken for how much free memory, that it changes no picture, and what it says."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import NANO
from tests.support.drawing import PARAMS, SMALL, draw, items, session_config
from tests.support.fake_cuda import driver  # noqa: F401 (a fixture)
from tests.support.free_memory import with_room
from tests.support.serving import settings
from zimage_runner.compile import Full, NoCompile
from zimage_runner.engines import placing
from zimage_runner.engines.base import EngineConfig
from zimage_runner.engines.diffusers.config import DiffusersEngine
from zimage_runner.engines.embedding_cache import EmbeddingCacheConfig
from zimage_runner.engines.footprint import Stack
from zimage_runner.engines.native import engine as native_engine
from zimage_runner.engines.native.assembly import load_model, read_config
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.native.streaming import large_weights
from zimage_runner.engines.precision import Precision
from zimage_runner.engines.request import LoadRequest, WarmupShape
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.memory.choice import chosen
from zimage_runner.memory.policies import (
    Auto,
    GroupOffload,
    Health,
    Memory,
    ModelOffload,
    Resident,
    SequentialOffload,
    Staged,
    Streamed,
)
from zimage_runner.model import Device, Dtype, Model, Source
from zimage_runner.runner.spec import NOT_DOWNLOADED, RunSpec
from zimage_runner.serve.session import ServedSession
from zimage_runner.session import Session
from zimage_runner.warmup import NoWarmup
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.controlnet import ControlNetFile
from zimage_runner.weights.formats.configs import TRANSFORMER, VAE, expected_shapes
from zimage_runner.weights.formats.controlnet import ControlLayout, Refiner
from zimage_runner.weights.preload.cuda_driver import CudaDriver
from zimage_runner.weights.preload.preload import Preload

PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": TRANSFORMER | {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
        "in_channels": 16,
    },
    "text_encoder": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vae": VAE | {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "in_channels": 3,
        "out_channels": 3, "mid_block_add_attention": True, "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
UNION = ControlLayout(33, tuple(range(0, 30, 2)), Refiner.own, (0, 1))
FP8 = NativeEngine(precision=Precision.fp8)
TABLE = 151936 * 2560 * 2 / 1e9
"""GB of the text encoder's table of tokens, which was on the device when the other figures were measured."""
REFINER = 2 * 2 * (4 * 3840**2 + 3 * 3840 * 10240) / 1e9
"""The same of what refines captions, with memory=streamed."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Z-Image's configs, without weights."""
    folder = tmp_path_factory.mktemp("published")
    for name, config in PUBLISHED.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    control = ControlNetFile(path=folder, files=(), layout=UNION, digest="")
    return Checkpoint(path=folder, revision="", digest="", controlnet=control)


def request(checkpoint: Checkpoint, side: int = 1024, batch: int = 1, memory: Memory | None = None, **others: Any):
    shape = WarmupShape(params=replace(PARAMS, height=side, width=side), caption_tokens=32, batch_size=batch)
    model = Model(name="z", source=Source.local, path=str(checkpoint.path), controlnet="union.safetensors")
    values = {
        "model": model,
        "compile": NoCompile(),
        "shapes": [shape],
        "memory": memory or Auto(),
        "captions": 1,
    } | others
    return LoadRequest(checkpoint=checkpoint, **values)


@pytest.mark.parametrize(
    ("engine", "kind", "others", "measured"),
    [
        (NativeEngine(), Resident, {}, 21.51 - TABLE),
        (NativeEngine(), Staged, {}, 13.66),
        (FP8, Resident, {}, 15.85 - TABLE),
        (FP8, Staged, {}, 8.00),
        (FP8, Streamed, {"batch": 3}, 2.78 - REFINER),
        (NativeEngine(), Resident, {"side": 512}, 20.70 - TABLE),
        (NativeEngine(), Resident, {"side": 512, "batch": 16}, 22.11 - TABLE),
        (FP8, Resident, {"side": 512, "batch": 16}, 16.16 - TABLE),
        (NativeEngine(), Resident, {"pictured": True}, 21.57 - TABLE),
        (FP8, Resident, {"pictured": True}, 15.91 - TABLE),
        (NativeEngine(), Resident, {"controlled": True}, 28.35 - TABLE),
        (NativeEngine(), Staged, {"controlled": True}, 20.45),
        (FP8, Resident, {"controlled": True}, 19.67 - TABLE),
        (DiffusersEngine(), Resident, {}, 23.29),
        (DiffusersEngine(), Staged, {}, 15.13),
        (DiffusersEngine(), ModelOffload, {}, 13.14),
        (DiffusersEngine(), GroupOffload, {}, 2.63),
    ],
)  # fmt: skip
def test_needs_are_those_that_were_measured(
    engine: EngineConfig, kind: type[Memory], others: dict[str, Any], measured: float, published: Checkpoint
) -> None:
    """GB allocated at most on an H200 (benchmarks/results, profile_notes.md): never less, and within a tenth."""
    peak = engine.peaks(request(published, **others))[kind] / 1e9
    assert measured - 0.005 <= peak <= 1.1 * measured


def test_streamed_stays_within_its_promise(published: Checkpoint) -> None:
    """docs/howto.md: bf16 in batches of 4."""
    assert NativeEngine().peaks(request(published, batch=4))[Streamed] <= 3.5e9


def test_weights_are_counted_as_they_are_loaded() -> None:
    model = load_model(NANO, Options())
    shapes = {name: expected_shapes(name, read_config(NANO / name)) for name in ("transformer", "vae")}
    stack = Stack.of(shapes["transformer"], 4)
    assert stack.whole == nbytes(model.transformer)
    blocks = [large_weights(block, model.options.dtype) for block in model.transformer.layers]
    assert stack.blocks[-len(blocks) :] == tuple(sum(weight.nbytes for weight in own) for own in blocks)
    nano = Model(name="nano", source=Source.embedded, dtype=Dtype.float32)
    peaks, more = (
        NativeEngine().peaks(request(Checkpoint(path=NANO, revision="", digest=""), model=nano, pictured=pictured))
        for pictured in (False, True)
    )
    features = 32 * 192 * 4  # of one caption
    assert peaks[Resident] - peaks[Staged] == nbytes(model.text_encoder) + features
    half = [shape for name, shape in shapes["vae"].items() if name.startswith("encoder.")]
    assert more[Staged] - peaks[Staged] == 4 * sum(map(math.prod, half))


def nbytes(network: Any) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def taken(engine: EngineConfig, free_gb: float, wanted: LoadRequest) -> str:
    return chosen(wanted.memory, placing.possible(engine, wanted), int(free_gb * 1e9)).memory.placement


@pytest.mark.parametrize(
    ("engine", "free_gb", "others", "expected"),
    [
        (NativeEngine(), 140.0, {}, "resident"),
        (NativeEngine(), 25.1, {}, "resident"),  # a 4090 or 3090
        (NativeEngine(), 16.6, {}, "staged"),
        (FP8, 16.6, {}, "resident"),
        (FP8, 15.9, {}, "staged"),
        (NativeEngine(), 12.4, {}, "streamed"),
        (FP8, 12.4, {}, "staged"),
        (NativeEngine(), 8.1, {}, "streamed"),
        (NativeEngine(), 0.5, {}, "streamed"),
        (NativeEngine(), 16.6, {"captions": 0}, "streamed"),
        (NativeEngine(), 8.1, {"adapted": True, "encoder_adapted": True}, "staged"),  # all that can be
        (NativeEngine(), 25.1, {"controlled": True}, "staged"),
        (NativeEngine(), 22.7, {"batch": 16}, "staged"),
        (NativeEngine(), 22.7, {"captions": 4096}, "staged"),
        (DiffusersEngine(), 80.0, {}, "resident"),
        (DiffusersEngine(), 16.6, {}, "staged"),
        (DiffusersEngine(), 14.3, {}, "model_offload"),
        (DiffusersEngine(), 8.1, {}, "group_offload"),
        (DiffusersEngine(), 8.1, {"adapted": True}, "model_offload"),
        (DiffusersEngine(), 8.1, {"compile": Full()}, "model_offload"),
        (DiffusersEngine(), 16.6, {"captions": 0}, "model_offload"),
        (NativeEngine(), 8.1, {"memory": Resident()}, "resident"),
    ],
)
def test_what_is_taken(
    engine: EngineConfig, free_gb: float, others: dict[str, Any], expected: str, published: Checkpoint
) -> None:
    wanted = request(published, **others)
    if not isinstance(wanted.memory, Auto):
        assert chosen(wanted.memory, {}, int(free_gb * 1e9)).memory is wanted.memory
        return
    assert taken(engine, free_gb, wanted) == expected


def test_common_fields_go_with_it() -> None:
    memory = Auto(per_process_fraction=0.5, vae_slicing=True, health=Health(max_reserved_gb=3))
    found = chosen(memory, {Resident: 30_000_000_000, GroupOffload: 1}, 10**9).memory
    assert found == GroupOffload(per_process_fraction=0.5, vae_slicing=True, health=Health(max_reserved_gb=3))


@pytest.mark.parametrize(
    ("free_gb", "told", "level"),
    [
        (40.0, None, None),
        (16.0, "memory=auto takes staged: 16.0 GB of the GPU's memory are free; resident would need 22.0 GB", "INFO"),
        (8.0, "memory=auto takes streamed: 8.0 GB of the GPU's memory are free; staged would need 14.7 GB", "INFO"),
        (
            0.5,
            "memory=auto takes streamed: 0.5 GB of the GPU's memory are free; streamed itself needs 3.4 GB, the least, "
            "staged would need 14.7 GB",
            "WARNING",
        ),
    ],
)
def test_what_is_told(
    free_gb: float, told: str | None, level: str | None, published: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        placing.place(NativeEngine(), request(published), "cuda", int(free_gb * 1e9))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == ([] if told is None else [(level, told)])


@pytest.mark.parametrize(
    ("memory", "engine", "cache", "known"),
    [
        (Auto(), NativeEngine(), None, 3),
        (Auto(), NativeEngine(device=Device.cpu), None, 0),
        (Resident(), NativeEngine(), None, 0),
        (Resident(), NativeEngine(), "cache", 3),
        (Staged(), NativeEngine(device=Device.cpu), None, 3),
    ],
)
def test_what_a_session_is_told_of_the_captions(
    memory: Memory, engine: EngineConfig, cache: str | None, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Any = SimpleNamespace(encodings=lambda: iter([(text, 512) for text in "abc"]))
    config: Any = SimpleNamespace(memory=memory, engine=engine, embedding_cache=EmbeddingCacheConfig(path=cache))
    spec = RunSpec(config=config, plan=plan, checkpoint=NOT_DOWNLOADED, session=session_config(engine, memory))
    assert len(spec.texts) == known
    monkeypatch.setattr("zimage_runner.runner.spec.MOST_AHEAD", 2)  # too many to be kept
    assert len(spec.texts) == (0 if isinstance(memory, Auto) else known)


def test_few_refined_captions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(NANO, Options())
    embeds = model.encode(["a red apple", "a cat", "a blue house at night"], 512)
    refined = [model._caption(one).clone() for one in embeds]
    model._captions.clear()
    monkeypatch.setattr("zimage_runner.engines.native.model.REFINED", 2)
    for _ in range(2):
        for one, expected in zip(embeds, refined, strict=True):
            assert torch.equal(model._caption(one), expected)
            assert len(model._captions) <= 2


def test_without_a_gpu_it_is_resident(published: Checkpoint) -> None:
    assert placing.place(NativeEngine(), request(published), "cpu").memory == Resident()


@pytest.fixture(scope="module")
def resident() -> dict[str, bytes]:
    return draw(Resident(), engine=NativeEngine(), params=SMALL)


@pytest.mark.parametrize("kind", [Resident, Staged, Streamed])
def test_pictures_are_the_same(kind: type[Memory], resident: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_room(monkeypatch, native_engine, kind)
    assert draw(Auto(), engine=NativeEngine(), params=SMALL) == resident
    assert asked == [Auto()]


def test_a_session_keeps_its_choice_and_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was freed or taken meanwhile by others changes nothing for a session that is rebuilt."""
    asked = with_room(monkeypatch, native_engine, Staged)
    config = session_config(NativeEngine(), Auto(), warmup=NoWarmup())
    key = config.key()
    session = Session(config, [WarmupShape(params=SMALL)], [("a red apple", 512)])
    session.start()
    report = session.report()
    assert report["placement"] == "staged"
    assert "resident would need" in report["placement_why"]
    assert session.captions.ahead
    session._load()
    assert (asked, session.report()["placement"], config.key()) == ([Auto(), Staged()], "staged", key)
    session.close()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the fake driver")
@pytest.mark.parametrize("fits", [True, False])
def test_nothing_is_sent_to_a_gpu_that_is_too_small(driver: CudaDriver, tmp_path: Path, fits: bool) -> None:  # noqa: F811
    (tmp_path / "a").write_bytes(b"abc")
    seen: list[int] = []
    load = Preload([(tmp_path / "a", 0, 3)], driver=driver, fits=lambda free: seen.append(free) or fits)
    assert load.free_bytes() == 1_000_000
    assert (seen, load.does_not_fit) == ([1_000_000], not fits)
    load.close()
    assert load.seconds.keys() == ({tmp_path / "a"} if fits else set())


def test_workers_that_share_a_gpu_take_their_share() -> None:
    config = session_config(NativeEngine(), Auto())
    assert RayExecutorConfig(num_gpus=0.5).adapt(config).memory.per_process_fraction == 0.5
    for memory, gpus in ((Resident(), 0.5), (Auto(), 1), (Auto(), 0), (Auto(), "auto")):
        adapted = RayExecutorConfig(num_gpus=gpus).adapt(replace(config, memory=memory))
        assert adapted.memory.per_process_fraction is None
    assert SequentialOffload not in DiffusersEngine().peaks(request(Checkpoint(path=NANO, revision="", digest="")))


def test_a_service_takes_no_placement_that_needs_its_captions_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the text encoder would be freed for the denoiser: its weights come layer by layer instead."""
    with_room(monkeypatch, native_engine, Streamed)
    session = ServedSession(session_config(NativeEngine(), Auto()), [WarmupShape(params=SMALL)])
    session.start()
    drawn = session.generate(items(1, SMALL)).images.wait()
    assert (session.report()["placement"], session.captions.ahead) == ("streamed", False)
    session.close()
    plain = ServedSession(session_config(NativeEngine(), Resident()), [WarmupShape(params=SMALL)])
    plain.start()
    assert (plain.generate(items(1, SMALL)).images.wait() == drawn).all()
    plain.close()


def test_a_service_may_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings("memory=streamed").config.memory.placement == "streamed"
