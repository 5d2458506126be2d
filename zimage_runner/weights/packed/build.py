"""Compile the kernel: ``python -m zimage_runner.weights.packed.build``.

Needs Triton, but no GPU. Run it after every change of definition.py or of the block's size; a test compares both with
what the file was made of.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from zimage_runner.weights.packed.format import BLOCK
from zimage_runner.weights.packed.kernel import FILE
from zimage_runner.weights.preload import machine_code
from zimage_runner.weights.preload.machine_code import ARCHITECTURES

WARPS = 16
"""Eight values a thread: a Triton scan of more has its layout converted back and forth, and four times the code."""
SOURCE = Path(__file__).with_name("definition.py")
TYPES = ("*u8", "*i16", "i32", "i32", "i32", "i32")


def compiled(architecture: int) -> tuple[bytes, dict[str, Any]]:
    """(deflated machine code, its entry without start and size). Both addresses are aligned."""
    from zimage_runner.weights.packed.definition import unpack

    addresses = [place for place, kind in enumerate(TYPES) if kind.startswith("*")]
    return machine_code.compiled(unpack, TYPES, {"BLOCK": BLOCK}, addresses, architecture, WARPS)


def source_digest() -> str:
    """sha256 of what the machine code is made of."""
    return hashlib.sha256(SOURCE.read_bytes() + repr((BLOCK, WARPS)).encode()).hexdigest()


def main() -> None:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # smaller, and no paths of this machine
    entries, codes = {}, []
    for architecture in ARCHITECTURES:
        code, entry = compiled(architecture)
        entries[str(architecture)] = entry | {"start": sum(map(len, codes)), "size": len(code)}
        codes.append(code)
        print(f"sm_{architecture}: {len(code) / 1024:.1f} KiB, {entry}")
    header = {"source": source_digest(), "compiler": machine_code.compiler(), "architectures": entries}
    FILE.write_bytes(machine_code.file_of(header, codes))


if __name__ == "__main__":
    main()
