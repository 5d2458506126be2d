"""What the NVIDIA driver says of a GPU, through its own library: no package is needed.

Which GPU: the first that a child process sees, so ``CUDA_VISIBLE_DEVICES`` as an index or as a UUID is honoured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeVar

LIBRARY = "libnvidia-ml.so.1"
TEXT_BYTES = 96

T = TypeVar("T", bound=Any)


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _Utilization(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gpu", "memory")]


class NvmlError(RuntimeError):
    """The driver refused a call, or is not there."""


class Gpu:
    """One GPU."""

    def __init__(self, library: Any, index: int) -> None:
        self._library, self.index = library, index
        self._handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(self._handle))
        self.uuid = self._text("nvmlDeviceGetUUID")
        self.name = self._text("nvmlDeviceGetName")

    def used_bytes(self) -> int:
        """Memory in use by everyone, CUDA contexts included."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory))
        return memory.used

    def busy_percent(self) -> int:
        """Share of the driver's last sample period in which any kernel ran."""
        utilization = _Utilization()
        self._call("nvmlDeviceGetUtilizationRates", self._handle, ctypes.byref(utilization))
        return utilization.gpu

    def _text(self, function: str) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        self._call(function, self._handle, buffer, ctypes.c_uint(TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def _call(self, function: str, *args: Any) -> None:
        code = getattr(self._library, function)(*args)
        if code:
            raise NvmlError(f"{function}: error {code}")


def visible_gpu(visible: str | None) -> Gpu | None:
    """The first GPU that a process with this ``CUDA_VISIBLE_DEVICES`` sees; None without any, or without the driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        if library.nvmlInit_v2():
            return None
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        gpus = [Gpu(library, index) for index in range(count.value)]
    except (OSError, AttributeError, NvmlError):
        return None
    return first_of(gpus, visible)


def first_of(gpus: Sequence[T], visible: str | None) -> T | None:
    """The GPU that CUDA numbers 0 under ``visible``: unset is all of them, empty or -1 none."""
    if visible is None:
        return gpus[0] if gpus else None
    first = visible.split(",")[0].strip()
    if first.isdigit():
        return gpus[int(first)] if int(first) < len(gpus) else None
    # CUDA takes any beginning of a UUID that only one GPU has.
    found = [gpu for gpu in gpus if first and gpu.uuid.startswith(first)]
    return found[0] if len(found) == 1 else None
