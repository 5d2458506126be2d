"""What kind of trouble an exception means. Told by type and message, so that nothing here imports torch."""

from __future__ import annotations

from zimage_runner.errors import RunStopped, exception_chain


class DeviceLost(RunStopped):
    """The GPU context is broken: every later call in this process would fail as well."""


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    # What remains of it where a library or torch itself hides it: cuBLAS cannot be set up in full memory, and torch
    # tries each of cuDNN's plans for a convolution until one finds room for its work area.
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "was unable to find an engine to execute this computation",
)
_DEVICE_LOST = (
    "CUDA error:",
    "device-side assert",
    "illegal memory access",
    "unspecified launch failure",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """GPU or host memory did not suffice; less of it may.

    The error may be what came of it: running out while a CUDA graph is recorded ends in a capture error.
    """
    return any(_says_out_of_memory(e) for e in exception_chain(error))


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """A CUDA error that outlives the call which met it."""
    if is_out_of_memory(error):
        return False
    return any(_says_device_lost(e) for e in exception_chain(error))


def _says_device_lost(error: BaseException) -> bool:
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_LOST)
