"""Which GPU is read, and what is made of the readings."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import device_memory
from benchmarks.device_memory import Gpu, first_of

GPUS = [Gpu(None, index, None, uuid) for index, uuid in enumerate(("GPU-aa11", "GPU-aa22", "GPU-bb33"))]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 0), ("0", 0), ("1", 1), ("2,0", 2), (" 1 ,0", 1), ("GPU-bb33", 2), ("GPU-bb", 2), ("GPU-aa22,0", 1),
        ("", None), ("-1", None), ("7", None), ("GPU-aa", None), ("GPU-zz", None),
    ],
)  # fmt: skip
def test_the_gpu_that_the_child_sees(visible: str | None, expected: int | None) -> None:
    assert first_of(GPUS, visible) is (None if expected is None else GPUS[expected])


def test_no_gpus_at_all() -> None:
    assert first_of([], None) is None


class Nvml(ModuleType):
    """pynvml on a machine with two GPUs; the second has more in use."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index + 100

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=handle * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=97)


def test_readings_come_from_the_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    gpu = device_memory.open_gpu({"CUDA_VISIBLE_DEVICES": "1"})
    assert gpu is not None
    assert (gpu.index, gpu.uuid, gpu.used_bytes(), gpu.busy_percent()) == (1, "GPU-101", 101 * 10**9, 97)
    described = device_memory.describe_gpu({"CUDA_VISIBLE_DEVICES": "GPU-100"})
    assert described == {"index": 0, "uuid": "GPU-100", "name": "NVIDIA H200"}


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetUUID"])
def test_a_refused_call_or_no_driver_is_no_gpu(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise Nvml.NVMLError

    monkeypatch.setattr(Nvml, call, refuse)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    assert device_memory.open_gpu({}) is None


def test_a_gpu_that_no_package_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(device_memory.machine, "is_cuda", lambda: False)
    assert device_memory.open_gpu({}) is None
    monkeypatch.setattr(device_memory.machine, "is_cuda", lambda: True)
    with pytest.raises(SystemExit, match=r"nvidia-ml-py: pip install zimage_runner\[bench\]"):
        device_memory.open_gpu({})


class FakeGpu:
    """20 GB were in use before, then 21, then 20.5; busy half of the time."""

    library = Nvml

    def __init__(self, *, tells_busy: bool = True) -> None:
        self.values = iter([20.0, 21.0, 20.5])
        self.last = 0.0
        self.tells_busy = tells_busy

    def used_bytes(self) -> int:
        self.last = next(self.values, self.last)
        return int(self.last * 1e9)

    def busy_percent(self) -> int:
        if not self.tells_busy:
            raise Nvml.NVMLError("not supported")
        return 50


@pytest.mark.parametrize("tells_busy", [True, False])
def test_use_counts_what_was_added_since_the_start(tells_busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "open_gpu", lambda environment: FakeGpu(tells_busy=tells_busy))
    monkeypatch.setattr(device_memory, "LEAST_SECONDS", 0.1)
    began = time.time()
    with device_memory.DeviceUse({}) as use:
        time.sleep(0.4)
    assert use.peak_gb == pytest.approx(1.0)
    assert use.busy_percent(began, time.time()) == (50 if tells_busy else None)
    assert use.busy_percent(began, began + 0.01) is None  # too short to tell


def test_without_a_gpu_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "open_gpu", lambda environment: None)
    with device_memory.DeviceUse({}) as use:
        pass
    assert use.peak_gb is None
    assert use.busy_percent(0.0, 10.0) is None
