"""Kernels that come compiled with the package: nothing to compile, and no compiler to import, before the first picture.

``sm_XX.bin`` holds the kernels of one GPU architecture (its form: machine_code.py).
``python -m zimage_runner.engines.native.kernels.build`` makes them.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zimage_runner.weights.preload.cuda_driver import LIBRARY
from zimage_runner.weights.preload.machine_code import ALIGNMENT, WARP, architecture_for, code_at, read_header

FOLDER = Path(__file__).parent / "prebuilt"
KINDS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
}
INT32_LIMIT = 2**31
LAUNCH_TYPES = (ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
"""cuLaunchKernel's: function, grid, block, shared memory, stream, parameters, nothing."""


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
        self.header, self._body = read_header(self._data)
        self.entries = {
            key: Entry(**(value | {"widths": tuple(value["widths"])})) for key, value in self.header["kernels"].items()
        }
        self._driver = ctypes.CDLL(LIBRARY)
        self._driver.cuLaunchKernel.argtypes = LAUNCH_TYPES
        self._launchers: dict[tuple[Any, ...], Launcher | None] = {}

    def launch(
        self, name: str, grid: Sequence[int], args: Sequence[Any], constants: dict[str, Any], warps: int, stream: int
    ) -> bool:
        """Launch on a CUDA stream. False, and nothing done, if there is no such kernel for these arguments."""
        kinds = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args]
        signature = (name, warps, *constants.items(), *kinds)
        try:
            launcher = self._launchers[signature]
        except KeyError:
            key = specialization(name, args, constants, warps)
            if key is None:
                return False
            launcher = self._launchers[signature] = self._load(key, args)
        return launcher is not None and launcher.launch(grid, args, stream)

    def _load(self, key: str, args: Sequence[Any]) -> Launcher | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        code = code_at(self._data, self._body + entry.start, entry.size)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if (
            self._driver.cuModuleLoadData(ctypes.byref(module), code)
            or self._driver.cuModuleGetFunction(ctypes.byref(function), module, entry.symbol.encode())
        ):  # fmt: skip
            return None  # a driver that is too old for it: Triton's compiler fits the machine
        return Launcher(self._driver.cuLaunchKernel, function, entry, args)


class Launcher:
    """A kernel in the driver's hands, and the memory that its arguments are written to for every launch.

    A picture takes more than a thousand launches, and the first one waits for the host: what does not change from one
    to the next is made once.
    """

    def __init__(
        self, launch: Callable[..., int], function: ctypes.c_void_p, entry: Entry, args: Sequence[Any]
    ) -> None:
        """``args`` are of the kinds that every launch will have."""
        self._launch, self._function, self._entry = launch, function, entry
        self._pointers = [isinstance(arg, torch.Tensor) for arg in args]
        self._aligned = [place for place, pointer in enumerate(self._pointers) if pointer] + list(entry.widths)
        letters = "".join(_letter(arg) for arg in args)
        self._pack = struct.Struct(letters).pack_into
        # Triton's kernels take two more pointers, to scratch memory that ours do not use (build.py makes sure).
        letters += "PP"
        self._values = ctypes.create_string_buffer(struct.calcsize(letters))
        start = ctypes.addressof(self._values)
        ends = [struct.calcsize(letters[: place + 1]) for place in range(len(letters))]
        places = [start + end - struct.calcsize(letter) for end, letter in zip(ends, letters)]
        self._parameters = (ctypes.c_void_p * len(places))(*places)
        self._lock = threading.Lock()

    def launch(self, grid: Sequence[int], args: Sequence[Any], stream: int) -> bool:
        """See Prebuilt.launch."""
        values = [arg.data_ptr() if pointer else arg for arg, pointer in zip(args, self._pointers)]
        for place in self._aligned:
            if values[place] % ALIGNMENT:
                return False
        x, y, z = (*grid, 1, 1)[:3]
        with self._lock:
            try:
                self._pack(self._values, 0, *values)
            except struct.error:  # an integer that takes more than 32 bits
                return False
            code = self._launch(
                self._function, x, y, z, WARP * self._entry.warps, 1, 1, self._entry.shared, stream,
                self._parameters, None,
            )  # fmt: skip
        if code != 0:
            raise RuntimeError(f"CUDA error {code} when kernel {self._entry.symbol} was launched")
        return True


def _letter(arg: Any) -> str:
    """How the struct module calls an argument's type."""
    if isinstance(arg, torch.Tensor):
        return "P"
    return "f" if isinstance(arg, float) else "i"


@functools.cache
def for_device(index: int) -> Prebuilt | None:
    """The kernels for this GPU's architecture, None if the package has none."""
    path = FOLDER / f"sm_{architecture_for(*torch.cuda.get_device_capability(index))}.bin"
    return Prebuilt(path) if path.exists() else None
