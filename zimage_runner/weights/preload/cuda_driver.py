"""The few CUDA driver calls that loading needs, through ctypes: weights can travel before torch is imported.

Calls that take time release the GIL. Memory comes from plain cuMemAlloc in the device's primary context, which is the
one that torch uses too. Names and signatures: CUDA Driver API reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from importlib import metadata
from typing import Any

LIBRARY = "libcuda.so.1"
_EVENT_DISABLE_TIMING = 0x2
_STREAM_NON_BLOCKING = 0x1
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76

_allocated = 0
_lock = threading.Lock()


def allocated_bytes() -> int:
    """Device memory that this process holds through the driver: torch's own statistics do not see it."""
    return _allocated


def _count(nbytes: int) -> None:
    global _allocated
    with _lock:
        _allocated += nbytes


@functools.cache
def torch_is_cpu_only() -> bool:
    """Whether the installed torch says so in its version, without importing it."""
    try:
        return "+cpu" in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False


class CudaUnavailable(Exception):
    """There is no usable CUDA driver or device; the caller loads the slow way."""


class CudaDriver:
    """One device's driver. Each thread calls ``enter`` before anything else."""

    def __init__(self, device: int = 0, library: str = LIBRARY) -> None:
        try:
            self._lib = ctypes.CDLL(library)
            self._quick = ctypes.PyDLL(library)
        except OSError as error:
            raise CudaUnavailable(str(error)) from error
        self._handle = handle = c_int()
        self._context = c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", byref(handle), device)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), handle)

    def enter(self) -> None:
        """Make the device current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """``with``: make the device current in this thread for a while, then what was before."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def release(self) -> None:
        """Give the context back: its memory, some hundred megabytes, is free again when nobody else holds it."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._handle)

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        """Device memory, 256-byte aligned; the address."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(nbytes))
        _count(nbytes)
        return address.value

    def free(self, address: int, nbytes: int) -> None:
        """Give back what ``allocate`` gave."""
        self._call("cuMemFree_v2", c_uint64(address))
        _count(-nbytes)

    def allocate_pinned(self, nbytes: int) -> int:
        """Page-locked host memory, which the device reads at the bus's speed; the address."""
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), c_size_t(nbytes), 0)
        assert address.value is not None
        return address.value

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", c_void_p(address))

    def stream(self) -> c_void_p:
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), _STREAM_NON_BLOCKING)
        return stream

    def finish(self, stream: c_void_p) -> None:
        """Wait until the stream has done all that it was given."""
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: c_void_p) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def event(self) -> c_void_p:
        event = c_void_p()
        self._call("cuEventCreate", byref(event), _EVENT_DISABLE_TIMING)
        return event

    def destroy_event(self, event: c_void_p) -> None:
        self._call("cuEventDestroy_v2", event)

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: c_void_p) -> None:
        """Start a copy. Keeps the GIL, as ``launch`` and ``record`` do: getting it back takes longer than the call."""
        self._check("cuMemcpyHtoDAsync_v2", self._quick, c_uint64(device), c_void_p(host), c_size_t(nbytes), stream)

    def record(self, event: c_void_p, stream: c_void_p) -> None:
        """``wait`` for the event waits for what the stream was given until now."""
        self._check("cuEventRecord", self._quick, event, stream)

    def capability(self) -> tuple[int, int]:
        """Compute capability, major and minor."""
        numbers = []
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, self._handle)
            numbers.append(value.value)
        return numbers[0], numbers[1]

    def load_function(self, code: bytes, name: str) -> c_void_p:
        """A kernel of a module of machine code; stays as long as the context."""
        module, function = c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), code)
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        return function

    def launch(
        self,
        function: c_void_p,
        blocks: int,
        threads: int,
        shared: int,
        stream: c_void_p | int,
        arguments: Sequence[Any],
    ) -> None:
        """Start a kernel on ``blocks`` blocks of ``threads`` threads with ``shared`` bytes of shared memory each.

        ``arguments``: ctypes values, which the driver copies.
        """
        parameters = (c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        shape = [c_uint(number) for number in (blocks, 1, 1, threads, 1, 1, shared)]
        stream = stream if isinstance(stream, c_void_p) else c_void_p(stream)
        self._check("cuLaunchKernel", self._quick, function, *shape, stream, parameters, None)

    def wait(self, event: c_void_p) -> None:
        self._call("cuEventSynchronize", event)

    def _call(self, name: str, *args: object) -> None:
        self._check(name, self._lib, *args)

    def _check(self, name: str, library: ctypes.CDLL, *args: object) -> None:
        code = getattr(library, name)(*args)
        if code != 0:
            raise CudaUnavailable(f"{name} failed with CUDA error {code}")
