"""Peak memory in use on the GPU while a process runs, read from the driver.

torch's own peak knows only what torch's allocator handed out; weights that a loader puts on the GPU through the driver
are not in it. What the driver counts includes the CUDA context, for everyone alike.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 0.05


class PeakDeviceMemory:
    """``with PeakDeviceMemory() as memory: ...``; then ``memory.peak_gb``, None without NVML (nvidia-ml-py) or GPU.

    Counts what was added since the start, on the first GPU; nothing else may use it meanwhile.
    """

    def __init__(self) -> None:
        self._nvml, self._handle = _open()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._before = self._peak = self._used()

    @property
    def peak_gb(self) -> float | None:
        return None if self._nvml is None else (self._peak - self._before) / 1e9

    def __enter__(self) -> PeakDeviceMemory:
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._peak = max(self._peak, self._used())

    def _used(self) -> int:
        return 0 if self._nvml is None else int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def _open() -> tuple[Any, Any]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None, None
