"""A warning before a large model is fetched for a CPU."""

from __future__ import annotations

import pytest

from zimage_runner.engines.auto import AutoEngine
from zimage_runner.engines.device import warn_without_gpu
from zimage_runner.model import Device, Model, Source

TURBO = Model(name="zimage_turbo", source=Source.modelscope, repo="a/b")


@pytest.mark.parametrize(
    ("model", "device", "node", "visible", "warned"),
    [
        (TURBO, Device.auto, None, None, True),
        (TURBO, Device.auto, "/dev/nvidiactl", None, False),
        (TURBO, Device.auto, "/dev/kfd", "0,1", False),
        (TURBO, Device.auto, "/dev/nvidiactl", "-1", True),
        (TURBO, Device.cpu, None, None, False),
        (Model(name="zimage_nano", source=Source.embedded), Device.auto, None, None, False),
        (Model(name="mine", source=Source.modelscope, repo="a/b", path="/here"), Device.auto, None, None, False),
    ],
)
def test_who_is_warned(monkeypatch, caplog, model, device, node, visible, warned) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level("WARNING", logger="zimage_runner"):
        warn_without_gpu(model, AutoEngine(device=device), exists=lambda path: path == node)
    assert [record.getMessage()[:22] for record in caplog.records] == ["no GPU is seen here, a"] * warned
