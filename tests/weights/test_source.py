"""The native engine on a prepared checkpoint that travelled through the preloader draws what the published one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.drawing import PARAMS
from tests.support.fake_cuda import host_tensor
from zimage_runner.engines.native import engine as native_engine
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.request import DenoiseRequest
from zimage_runner.errors import UserError
from zimage_runner.model import Device, Model, Prepare, Source
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.preload import preload, source
from zimage_runner.weights.preload.cuda_driver import CudaDriver
from zimage_runner.weights.prepared.prepare import build

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the fake driver")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    return Model(name="zimage_nano", source=Source.embedded, prepare=Prepare.always)


def test_preloaded_equals_published(model: Model, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(model)
    build(checkpoint, model)
    monkeypatch.setattr(preload, "CudaDriver", lambda: driver)
    monkeypatch.setattr(source, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(source, "_wrap", host_tensor)
    weights = source.begin(checkpoint, model, Device.auto)
    assert weights.path != checkpoint.path
    weights.device = "cuda"  # settle("cuda") would, on a machine with a GPU
    options = Options(dtype=torch.bfloat16)
    published = checkpoint.path
    ours, theirs = load_model(weights.path, options, weights.tensors, published), load_model(published, options)
    for part in ("transformer", "text_encoder", "vae"):
        expected: dict[str, Any] = getattr(theirs, part).state_dict()
        found = getattr(ours, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_captions_are_encoded_while_the_transformer_is_still_on_its_way(
    model: Model, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    checkpoint = resolve(model)
    build(checkpoint, model)
    monkeypatch.setattr(preload, "CudaDriver", lambda: driver)
    monkeypatch.setattr(source, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(source, "_wrap", host_tensor)
    options = Options(dtype=torch.bfloat16)

    def draw(encodes: bool, *, travels: bool) -> torch.Tensor:
        weights = source.begin(checkpoint, model, Device.auto)
        if not travels:
            weights = source.WeightsSource(checkpoint, model, None, None)
        else:
            weights.device = "cuda"
        engine = NativeEngineAdapter(weights, options, staged=False, encodes=encodes, published=checkpoint.path)
        assert hasattr(engine.model, "text_encoder") == encodes
        assert hasattr(engine.model, "transformer") == (not (travels and encodes))
        embeds = engine.encode(["a red apple"], 512)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        request = DenoiseRequest(prompt_embeds=embeds, negative_prompt_embeds=None, noise=noise, params=PARAMS)
        latents = engine.denoise(request)
        assert {"text_encoder", "transformer", "vae"} <= engine.load_phases.keys()
        return latents

    expected = draw(True, travels=False)
    assert torch.equal(draw(True, travels=True), expected)
    assert torch.equal(draw(False, travels=True), expected)


def test_a_transformer_that_does_not_fit_is_refused_in_one_line_when_it_comes_late(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    checkpoint = resolve(model)
    weights = source.WeightsSource(checkpoint, model, None, None)
    engine = NativeEngineAdapter(weights, Options(), staged=True)
    monkeypatch.setattr(native_engine, "load_transformer", lambda *_: {}["dim"])
    request = DenoiseRequest(prompt_embeds=[], negative_prompt_embeds=None, noise=torch.zeros(0), params=PARAMS)
    with pytest.raises(UserError, match=r"^engine=native cannot run .*: 'dim'; use engine=diffusers$"):
        engine.denoise(request)


def test_on_the_cpu_the_published_files_are_read(model: Model) -> None:
    checkpoint = resolve(model)
    weights = source.begin(checkpoint, model, Device.auto)
    weights.settle("cpu", "float32")
    assert weights.path == checkpoint.path
    assert weights.tensors("transformer") is None
