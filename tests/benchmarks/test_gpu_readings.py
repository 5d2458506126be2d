"""Which GPU is read, and what is made of the readings."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import device_memory, nvml
from benchmarks.nvml import first_of

GPUS = [SimpleNamespace(uuid=uuid) for uuid in ("GPU-aa11", "GPU-aa22", "GPU-bb33")]


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


class Driver:
    """The driver's library with two GPUs; the second has more in use."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = index.value + 100
        return 0

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, text: Any, size: ctypes.c_uint) -> int:
        text.value = f"GPU-{handle.value}".encode()
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, text: Any, size: ctypes.c_uint) -> int:
        text.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        assert handle.value is not None
        memory._obj.used = handle.value * 10**9
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, rates: Any) -> int:
        rates._obj.gpu = 97
        return 0


def test_readings_come_from_the_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Driver())
    gpu = device_memory.open_gpu({"CUDA_VISIBLE_DEVICES": "1"})
    assert gpu is not None
    assert (gpu.index, gpu.uuid, gpu.name, gpu.used_bytes(), gpu.busy_percent()) == (
        1, "GPU-101", "NVIDIA H200", 101 * 10**9, 97,
    )  # fmt: skip
    described = device_memory.describe_gpu({"CUDA_VISIBLE_DEVICES": "GPU-100"})
    assert described == {"index": 0, "uuid": "GPU-100", "name": "NVIDIA H200"}


def test_a_refused_call_or_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "nvmlDeviceGetUUID", lambda *args: 3)
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Driver())
    assert device_memory.open_gpu({}) is None
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-library.so.1")
    monkeypatch.undo()
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-library.so.1")
    assert device_memory.open_gpu({}) is None


class FakeGpu:
    """20 GB were in use before, then 21, then 20.5; busy half of the time."""

    def __init__(self, *, tells_busy: bool = True) -> None:
        self.values = iter([20.0, 21.0, 20.5])
        self.last = 0.0
        self.tells_busy = tells_busy

    def used_bytes(self) -> int:
        self.last = next(self.values, self.last)
        return int(self.last * 1e9)

    def busy_percent(self) -> int:
        if not self.tells_busy:
            raise nvml.NvmlError("not supported")
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
