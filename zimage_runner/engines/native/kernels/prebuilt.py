"""Kernels that come compiled with the package: nothing to compile, and no compiler to import, before the first picture.

``sm_XX.bin`` holds the kernels of one GPU architecture: the length of a JSON header (8 bytes, little endian), the
header, then each kernel's machine code, deflated. ``python -m zimage_runner.engines.native.kernels.build`` makes them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zimage_runner.weights.cuda_driver import LIBRARY

FOLDER = Path(__file__).parent / "prebuilt"
ALIGNMENT = 16
"""Bytes, and elements of a width, that the machine code takes for granted where it says so."""
WARP = 32
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
INT32_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel in the file."""

    symbol: str
    shared: int
    """Bytes of shared memory."""
    warps: int
    widths: tuple[int, ...]
    """Places of integer arguments that must be multiples of ALIGNMENT."""
    start: int
    size: int


def specialization(name: str, args: Sequence[Any], constants: dict[str, Any], warps: int) -> str | None:
    """What a kernel is compiled for: argument types, constants, warps. None for a type that none is compiled for."""
    kinds = [_kind(arg) for arg in args]
    if None in kinds:
        return None
    values = ",".join(f"{key}={int(value)}" for key, value in constants.items())
    return f"{name}({','.join(filter(None, kinds))}) {values} {warps}"


def _kind(arg: Any) -> str | None:
    if isinstance(arg, torch.Tensor):
        kind = KINDS.get(arg.dtype)
        return None if kind is None else f"*{kind}"
    if isinstance(arg, float):
        return "fp32"
    return "i32" if abs(arg) < INT32_LIMIT else None


class Prebuilt:
    """An architecture's kernels, each handed to the driver when it is first launched."""

    def __init__(self, path: Path) -> None:
        self._data = memoryview(path.read_bytes())
        length = int.from_bytes(self._data[:8], "little")
        self.header: dict[str, Any] = json.loads(bytes(self._data[8 : 8 + length]))
        self._body = 8 + length
        self.entries = {
            key: Entry(**(value | {"widths": tuple(value["widths"])})) for key, value in self.header["kernels"].items()
        }
        self._driver = ctypes.CDLL(LIBRARY)
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(self, key: str, grid: Sequence[int], args: Sequence[Any]) -> bool:
        """Launch on torch's current stream. False, and nothing done, if there is no such kernel for these arguments."""
        entry = self.entries.get(key)
        if entry is None or not _aligned(entry, args):
            return False
        function = self._functions.get(key) or self._load(key, entry)
        if not function:
            return False
        # Triton's kernels take two more pointers, to scratch memory that ours do not use (build.py makes sure).
        values = [*map(_value, args), ctypes.c_void_p(), ctypes.c_void_p()]
        parameters = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        x, y, z = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = self._driver.cuLaunchKernel(
            function, x, y, z, WARP * entry.warps, 1, 1, entry.shared, stream, parameters, None
        )
        if code != 0:
            raise RuntimeError(f"CUDA error {code} when kernel {entry.symbol} was launched")
        return True

    def _load(self, key: str, entry: Entry) -> ctypes.c_void_p | None:
        code = zlib.decompress(self._data[self._body + entry.start : self._body + entry.start + entry.size])
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if (
            self._driver.cuModuleLoadData(ctypes.byref(module), code)
            or self._driver.cuModuleGetFunction(ctypes.byref(function), module, entry.symbol.encode())
        ):  # fmt: skip
            del self.entries[key]  # a driver that is too old for it: Triton's compiler fits the machine
            return None
        self._functions[key] = function
        return function


def _aligned(entry: Entry, args: Sequence[Any]) -> bool:
    pointers = all(arg.data_ptr() % ALIGNMENT == 0 for arg in args if isinstance(arg, torch.Tensor))
    return pointers and all(args[place] % ALIGNMENT == 0 for place in entry.widths)


def _value(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int32(arg)


@functools.cache
def for_device(index: int) -> Prebuilt | None:
    """The kernels for this GPU's architecture, None if the package has none."""
    major, minor = torch.cuda.get_device_capability(index)
    # Machine code of 8.0 runs on all of 8.x; that of 9 and later is for its own architecture alone.
    path = FOLDER / f"sm_{80 if major == 8 else 10 * major + minor}.bin"
    return Prebuilt(path) if path.exists() else None
