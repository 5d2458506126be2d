"""The kernel in the driver's hands. Imports neither torch nor Triton.

``unpack.bin`` holds it for each architecture (its form: machine_code.py).
``python -m zimage_runner.weights.packed.build`` makes it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from zimage_runner.weights.packed.format import BLOCK, Frame
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.preload.machine_code import WARP, architecture_for, code_at, read_header

FILE = Path(__file__).with_name("unpack.bin")


class UnpackKernel:
    """Launches the kernel on the driver's device, which must be current in the thread."""

    def __init__(self, driver: CudaDriver) -> None:
        """Raises CudaUnavailable where there is no machine code for the device or the driver does not take it."""
        data = FILE.read_bytes()
        header, start = read_header(data)
        major, minor = driver.capability()
        entry = header["architectures"].get(str(architecture_for(major, minor)))
        if entry is None:
            raise CudaUnavailable(f"no kernel unpacks weights on GPUs of compute capability {major}.{minor}")
        code = code_at(data, start + entry["start"], entry["size"])
        self._function = driver.load_function(code, entry["symbol"])
        self._driver = driver
        self._threads, self._shared = WARP * entry["warps"], entry["shared"]

    def launch(self, data: int, out: int, frame: Frame, stream: ctypes.c_void_p | int) -> None:
        """Unpack on a stream from one device address to another, both 16-byte aligned: ``frame`` has counts."""
        assert frame.counts is not None
        numbers = [ctypes.c_int32(number) for number in (frame.values, *frame.counts)]
        # Triton's kernels take two more pointers, to scratch memory that this one does not use (build.py makes sure).
        arguments = [ctypes.c_uint64(data), ctypes.c_uint64(out), *numbers, ctypes.c_uint64(), ctypes.c_uint64()]
        blocks = -(-frame.values // BLOCK)
        self._driver.launch(self._function, blocks, self._threads, self._shared, stream, arguments)
