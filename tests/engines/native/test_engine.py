"""The Engine contract over the native model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import NANO
from tests.support.engines import MODEL, PARAMS, create, picture
from zimage_runner.compile import Compile
from zimage_runner.engines.base import Engine
from zimage_runner.engines.device import choose_device
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.request import Needs
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import ModelOffload, Resident, Staged
from zimage_runner.model import Device
from zimage_runner.sampling import SamplingParams


@pytest.fixture(scope="module")
def engine():
    engine = create(NativeEngine(device=Device.cpu))
    yield engine
    engine.close()


def test_describes_itself(engine: NativeEngineAdapter) -> None:
    assert (engine.device, engine.dtype, engine.attention) == ("cpu", "float32", "native")
    assert (engine.latent_channels, engine.vae_scale_factor) == (16, 8)
    assert engine.numerics()["engine"] == "native"
    assert list(engine.load_phases) == ["open", "text_encoder", "transformer", "vae"]
    engine.synchronize()


@pytest.fixture(scope="module")
def diffusers_engine():
    engine = create(DiffusersEngine(device=Device.cpu))
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "params",
    [PARAMS, replace(PARAMS, guidance_scale=2.0, negative_prompt="blurry", cfg_truncation=0.7, cfg_normalization=1.0)],
    ids=["plain", "guided"],
)
def test_draws_the_diffusers_engines_picture(
    engine: NativeEngineAdapter, diffusers_engine: Engine, params: SamplingParams
) -> None:
    expected, got = picture(diffusers_engine, params), picture(engine, params)
    assert got.shape == (1, 128, 128, 3)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_a_checkpoint_it_does_not_compute(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(NANO, path)
    config = path / "scheduler" / "scheduler_config.json"
    changed = json.loads(config.read_text(encoding="utf-8")) | {"use_dynamic_shifting": True}
    config.unlink()
    config.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(UserError, match=r"use_dynamic_shifting=True is not supported.*use engine=diffusers"):
        create(NativeEngine(device=Device.cpu), path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"attention": "xformers"}, "engine.attention=xformers is unknown to engine=native"),
        ({"cuda_graphs": -1}, "engine.cuda_graphs=-1 is negative"),
    ],
)
def test_fields_that_are_refused(fields: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        NativeEngine(**fields)


def test_combinations_that_are_refused() -> None:
    class Regional(Compile):
        @property
        def label(self) -> str:
            return "regional"

    check = NativeEngine().check
    check(Needs(model=MODEL, memory=Resident(), compile=Compile()))
    with pytest.raises(UserError, match=r"compile=regional does nothing for engine=native"):
        check(Needs(model=MODEL, memory=Resident(), compile=Regional()))
    with pytest.raises(UserError, match=r"memory=model_offload is not for engine=native"):
        check(Needs(model=MODEL, memory=ModelOffload(), compile=Compile()))
    for device, noise in ((Device.cpu, Device.cuda), (Device.auto, Device.auto)):
        with pytest.raises(UserError, match=rf"^engine\.noise_device={noise.value}: use cpu, which is the same"):
            NativeEngine(device=device, noise_device=noise).check(
                Needs(model=MODEL, memory=Resident(), compile=Compile())
            )
    NativeEngine(noise_device=Device.cuda).check(Needs(model=MODEL, memory=Resident(), compile=Compile()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_noise_of_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"^engine\.noise_device=cuda: use cpu"):
        choose_device(NativeEngine(noise_device=Device.cuda))
    assert choose_device(NativeEngine()) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpus_attention_on_the_cpu() -> None:
    with pytest.raises(UserError, match=r"engine\.attention=cudnn needs a CUDA GPU"):
        create(NativeEngine(device=Device.cpu, attention="cudnn"))


def test_staged_holds_either_the_encoder_or_the_denoiser(engine: NativeEngineAdapter) -> None:
    staged = create(NativeEngine(device=Device.cpu), memory=Staged())
    expected = picture(engine)
    for _ in range(2):
        embeds = staged.encode(["a red apple"], 512)
        assert (hasattr(staged.model, "text_encoder"), hasattr(staged.model, "transformer")) == (True, False)
        assert np.array_equal(picture(staged), expected)
        assert (hasattr(staged.model, "text_encoder"), hasattr(staged.model, "transformer")) == (False, True)
        assert torch.equal(embeds[0], engine.encode(["a red apple"], 512)[0])
    staged.close()
    assert not hasattr(staged.model, "vae")


def test_decoding_carefully(engine: NativeEngineAdapter) -> None:
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    usual = engine.decode(latents).wait()
    assert np.array_equal(engine.decode_carefully(latents, float32=True, tiled=True).wait(), usual)
