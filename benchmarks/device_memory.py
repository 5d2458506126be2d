"""What a process does to the GPU that it sees, read from the driver: peak memory, and how busy it was.

torch's own peak knows only what torch's allocator handed out; weights that a loader puts on the GPU through the driver
are not in it. What the driver counts includes the CUDA context, for everyone alike.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from benchmarks import machine

INTERVAL_SECONDS = 0.05
LEAST_SECONDS = 2.0
"""The driver's reading of how busy the GPU is lags by up to a second: shorter spans say nothing."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, read through pynvml (package nvidia-ml-py)."""

    library: Any
    """The module."""
    index: int
    handle: Any
    uuid: str

    def used_bytes(self) -> int:
        """Memory in use by everyone, CUDA contexts included."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)

    def busy_percent(self) -> int:
        """Share of the driver's last sample period in which any kernel ran."""
        return self.library.nvmlDeviceGetUtilizationRates(self.handle).gpu


class DeviceUse:
    """``with DeviceUse(environment) as use: ...``; ``environment`` is the process's own (CUDA_VISIBLE_DEVICES).

    Memory is what was added since the start; nothing else may use that GPU meanwhile.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._gpu = open_gpu(environment)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._busy: list[tuple[float, int]] = []
        self._before = self._peak = 0 if self._gpu is None else self._gpu.used_bytes()

    @property
    def peak_gb(self) -> float | None:
        """GB (1e9 bytes); None without a GPU that can be read."""
        return None if self._gpu is None else (self._peak - self._before) / 1e9

    def busy_percent(self, start: float, end: float) -> float | None:
        """Mean share of the time in which any kernel ran, between two ``time.time()``; None if that cannot be told."""
        values = [value for at, value in self._busy if start <= at <= end]
        if end - start < LEAST_SECONDS or not values:
            return None
        return statistics.fmean(values)

    def __enter__(self) -> DeviceUse:
        if self._gpu is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _poll(self) -> None:
        assert self._gpu is not None
        tells_busy = True
        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                self._peak = max(self._peak, self._gpu.used_bytes())
                if tells_busy:
                    self._busy.append((time.time(), self._gpu.busy_percent()))
            except self._gpu.library.NVMLError:
                tells_busy = False  # some virtual machines keep it to themselves


def open_gpu(environment: Mapping[str, str]) -> Gpu | None:
    """The GPU that a process with this environment computes on; None without any, or without NVIDIA's driver.

    Exits where there is a GPU and no package to read it with.
    """
    try:
        import pynvml
    except ImportError:
        if machine.is_cuda():
            raise SystemExit("the GPU is read with nvidia-ml-py: pip install zimage_runner[bench]") from None
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [Gpu(pynvml, index, handle, pynvml.nvmlDeviceGetUUID(handle)) for index, handle in enumerate(handles)]
    except pynvml.NVMLError:
        return None
    return first_of(gpus, environment.get("CUDA_VISIBLE_DEVICES"))


def first_of(gpus: Sequence[Gpu], visible: str | None) -> Gpu | None:
    """The GPU that CUDA numbers 0 under ``visible``: unset is all of them, empty or -1 none."""
    if visible is None:
        return gpus[0] if gpus else None
    first = visible.split(",")[0].strip()
    if first.isdigit():
        return gpus[int(first)] if int(first) < len(gpus) else None
    # CUDA takes any beginning of a UUID that only one GPU has.
    found = [gpu for gpu in gpus if first and gpu.uuid.startswith(first)]
    return found[0] if len(found) == 1 else None


def describe_gpu(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Which GPU that is: number on the machine, UUID and name."""
    gpu = open_gpu(environment)
    if gpu is None:
        return None
    return {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.library.nvmlDeviceGetName(gpu.handle)}
