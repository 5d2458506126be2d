"""Weights that are still on their way are not waited for before they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_cuda import host_tensor
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.model import Options
from zimage_runner.model import Device, Model, Prepare, Source
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.preload import preload, source
from zimage_runner.weights.preload.cuda_driver import CudaDriver
from zimage_runner.weights.preload.source import WeightsSource
from zimage_runner.weights.prepared.prepare import build

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the fake driver")

OPTIONS = Options(dtype=torch.bfloat16)


@pytest.fixture
def travelling(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], WeightsSource]:  # fmt: skip
    """Makes a source of the embedded model whose prepared weights travel through a driver of host memory."""
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    model = Model(name="zimage_nano", source=Source.embedded, prepare=Prepare.always)
    checkpoint = resolve(model)
    build(checkpoint, model)
    monkeypatch.setattr(preload, "CudaDriver", lambda: driver)
    monkeypatch.setattr(source, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(source, "_wrap", host_tensor)

    def begin() -> WeightsSource:
        weights = source.begin(checkpoint, model, Device.auto)
        weights.device = "cuda"  # settle("cuda") would, on a machine with a GPU
        return weights

    return begin


class Stream:
    waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def test_the_engines_own_work_is_waited_for_and_no_copy_on_its_way(travelling, monkeypatch) -> None:
    def everything() -> None:
        raise AssertionError("waits for the copies too")

    stream = Stream()
    cuda: Any = torch.cuda
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(cuda, "synchronize", everything)
    weights = travelling()
    engine = NativeEngineAdapter(weights, OPTIONS, staged=False, published=weights._checkpoint.path)
    assert stream.waits == len(engine.load_phases) == 2
    engine.device = "cuda"
    engine.synchronize()
    assert stream.waits == 3
    engine._load_denoiser()
    with pytest.raises(AssertionError, match="copies"):  # by now pictures may be on a stream of their own
        engine.synchronize()
