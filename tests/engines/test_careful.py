"""Decoding in float32 and in tiles, and what the engines are like afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support import NANO
from zimage_runner.compile import NoCompile
from zimage_runner.engines.base import Engine
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.request import LoadRequest
from zimage_runner.errors import BadPictureError
from zimage_runner.memory.policies import Resident
from zimage_runner.model import Device, Dtype, Model, Source
from zimage_runner.weights.find.checkpoint import Checkpoint


@pytest.fixture(scope="module", params=[DiffusersEngine, NativeEngine])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    wanted = LoadRequest(
        checkpoint=Checkpoint(path=NANO, revision="test", digest="0" * 64),
        model=Model(name="nano", source=Source.embedded, dtype=Dtype.bfloat16),
        memory=Resident(),
        compile=NoCompile(),
    )
    made = request.param(device=Device.cpu).create(wanted)
    yield made
    made.close()


@pytest.fixture(scope="module")
def usual(engine: Engine) -> np.ndarray:
    return decode(engine, SMALL)


@pytest.fixture(scope="module")
def larger(engine: Engine) -> np.ndarray:
    return decode(engine, TILED)


SMALL, TILED = 5, 8
"""Latent positions a side. The larger is cut into tiles of 4, as the smaller would be if tiling stayed on; bfloat16,
for which CPUs are slow, is decoded of the smaller where that is enough."""


def latents(side: int) -> torch.Tensor:
    return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(1))


def decode(engine: Engine, side: int, **options: bool) -> np.ndarray:
    pending = engine.decode_carefully(latents(side), **options) if options else engine.decode(latents(side))
    return pending.wait()[0].astype(int)


@pytest.mark.parametrize("options", [{"float32": True}, {"tiled": True}, {"float32": True, "tiled": True}])
def test_careful_pictures_are_nearly_the_same_and_leave_no_trace(engine, usual, larger, options):
    careful = decode(engine, TILED, **options)
    assert careful.shape == larger.shape == (64, 64, 3)
    # Tiles lose sight of their surroundings (group norm); float32 only rounds less.
    assert np.abs(careful - larger).mean() < (20 if "tiled" in options else 3)
    assert (decode(engine, SMALL) == usual).all()


def test_float32_differs_from_bfloat16(engine, usual):
    assert (decode(engine, SMALL, float32=True) != usual).any()


@pytest.mark.parametrize("options", [{}, {"float32": True}])
def test_broken_latents_stay_broken(engine, options):
    broken = latents(SMALL)
    broken[0, 3, 2, 1] = torch.nan
    pending = engine.decode_carefully(broken, **options) if options else engine.decode(broken)
    with pytest.raises(BadPictureError):  # only now: what decode raises is no bad picture, and not drawn once more
        pending.wait()


def test_free_memory_leaves_the_engine_usable(engine, usual):
    engine.free_memory()
    assert (decode(engine, SMALL) == usual).all()
