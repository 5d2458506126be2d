"""Whether the numbers of a file are numbers: NaN and infinities are found before anything is loaded.

Looked for once for each file, as its sha256 is, and remembered with its size and times.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from zimage_runner.errors import UserError
from zimage_runner.weights.cache import read_entry, write_entry
from zimage_runner.weights.find.verify import PIECE, file_state
from zimage_runner.weights.formats.checkpoint_file import Component
from zimage_runner.weights.io import Threads, read_exactly
from zimage_runner.weights.safetensors_file import TensorInfo

THREADS = 4
EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("u1", 0x7F), "F8_E5M2": ("u1", 0x7C),
}  # fmt: skip
"""Of each dtype: the bits that are all ones in NaN and in infinities alone (e4m3 has no infinities)."""
Stretch = tuple[str, TensorInfo, int, int]
"""(tensor's name, where it lies, first byte, bytes)."""


def check_finite(components: Collection[Component], force: bool = False) -> None:
    """Raise UserError naming a tensor that holds NaN or infinity. A file that has passed is not read again.

    Whole numbers and GGUF's blocks are passed over; the latter are looked at when they are decoded.
    """
    by_file: dict[Path, dict[str, TensorInfo]] = {}
    for component in components:
        for tensor in component.tensors.values():
            stored, found = tensor.stored, by_file.setdefault(tensor.stored.path, {})
            found[stored.name] = stored.info
            found |= {f"{stored.name} ({role})": info for role, info in stored.scales.items()}
    for path, infos in by_file.items():
        check_finite_tensors(path, infos, force)


def check_finite_tensors(path: Path, infos: dict[str, TensorInfo], force: bool = False) -> None:
    """The same of the tensors of one file, name -> where it lies."""
    key, state = f"{path.resolve()} {sorted(infos)[0]} {len(infos)}", file_state(path)
    if force or (read_entry("finite", key) or {}).get("state") != state:
        _check(path, infos)
        write_entry("finite", key, {"state": state})


def _check(path: Path, infos: dict[str, TensorInfo]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with Threads(THREADS) as pool:

            def look(stretch: Stretch) -> str | None:
                pool.check()
                return None if _is_finite(handle, path, stretch) else stretch[0]

            bad = sorted({name for name in pool.map(look, _stretches(infos)) if name is not None})
    finally:
        os.close(handle)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{path}: {bad[0]}{more} holds NaN or infinity: the file is damaged, or its training failed")


def _stretches(infos: dict[str, TensorInfo]) -> Iterator[Stretch]:
    for name, info in infos.items():
        if info.dtype in EXPONENTS:
            for begin in range(0, info.nbytes, PIECE):
                yield name, info, info.start + begin, min(PIECE, info.nbytes - begin)


def _is_finite(handle: int, path: Path, stretch: Stretch) -> bool:
    import numpy as np

    _, info, start, nbytes = stretch
    kind, exponent = EXPONENTS[info.dtype]
    memory = bytearray(nbytes)
    read_exactly(handle, start, memoryview(memory), path)
    bits = np.frombuffer(memory, kind)
    return not bool(((bits & bits.dtype.type(exponent)) == exponent).any())
