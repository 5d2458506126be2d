"""The kernel in the driver's hands. Imports neither torch nor Triton.

``unpack.bin`` is the length of a JSON header (8 bytes, little endian), the header, and for each architecture the
kernel's machine code, deflated. ``python -m zimage_runner.weights.unpacking.build`` makes it.
"""

from __future__ import annotations

import ctypes
import json
import zlib
from pathlib import Path
from typing import Any

from zimage_runner.weights.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.packed import BLOCK, Frame

FILE = Path(__file__).with_name("unpack.bin")
WARP = 32


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """(the header of ``unpack.bin``, where the machine code begins)."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


class UnpackKernel:
    """Launches the kernel on the driver's device, which must be current in the thread."""

    def __init__(self, driver: CudaDriver) -> None:
        """Raises CudaUnavailable where there is no machine code for the device or the driver does not take it."""
        data = FILE.read_bytes()
        header, start = read_header(data)
        major, minor = driver.capability()
        # Machine code of 8.0 runs on all of 8.x; that of 9 and later is for its own architecture alone.
        architecture = 80 if major == 8 else 10 * major + minor
        entry = header["architectures"].get(str(architecture))
        if entry is None:
            raise CudaUnavailable(f"no kernel unpacks weights on GPUs of compute capability {major}.{minor}")
        start += entry["start"]
        code = zlib.decompress(data[start : start + entry["size"]])
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
