"""CUDA on machines without it: a driver made of host memory (fake_cuda.c), and streams that do their work at once."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zimage_runner.weights.preload.cuda_driver import CudaDriver
from zimage_runner.weights.preload.preload import DeviceBuffer, Preload

if TYPE_CHECKING:
    import torch


def build_fake(folder: Path) -> CudaDriver:
    """A CUDA driver of host memory, compiled into a folder."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc for the fake driver")
    library = folder / "libcuda_fake.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return CudaDriver(library=str(library))


@pytest.fixture
def driver(tmp_path: Path) -> CudaDriver:
    return build_fake(tmp_path)


@pytest.fixture(params=["at once", "late"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the driver does what it is given: at once, or when somebody waits for it and not before."""
    if request.param == "late":
        monkeypatch.setenv("FAKE_CUDA_LAZY", "1")


def on_device(buffer: DeviceBuffer) -> bytes:
    interface = buffer.__cuda_array_interface__
    return ctypes.string_at(interface["data"][0], interface["shape"][0])


def pinned(driver: CudaDriver) -> int:
    return ctypes.c_int.in_dll(driver._lib, "fake_pinned").value


def host_tensor(load: Preload, path: Path) -> torch.Tensor:
    """What torch.as_tensor does with real device memory; the fake driver's memory is the host's."""
    import torch

    buffer = load.take(path)
    memory = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address)
    memory._buffer = buffer  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


class FakeStream:
    """Stands for a CUDA stream on machines without one: work on it is done at once."""

    def __init__(self, *args: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass
