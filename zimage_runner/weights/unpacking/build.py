# pyright: reportMissingImports=false
"""Compile the kernel: ``python -m zimage_runner.weights.unpacking.build``.

Needs Triton, but no GPU. Run it after every change of definition.py or of the block's size; a test compares both with
what the file was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from zimage_runner.weights.packed import BLOCK
from zimage_runner.weights.unpacking.kernel import FILE

ARCHITECTURES = (80, 90, 100, 120)
"""A100, A10, L4, RTX 30 and 40; H100, H200; B200; RTX 50."""
WARPS = 16
"""Eight values a thread: a Triton scan of more has its layout converted back and forth, and four times the code."""
ALIGNMENT = 16
"""Bytes, of both addresses."""
SOURCE = Path(__file__).with_name("definition.py")
TYPES = ("*u8", "*i16", "i32", "i32", "i32", "i32")


def compiled(architecture: int) -> tuple[bytes, dict[str, Any]]:
    """(deflated machine code, its entry without start and size)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zimage_runner.weights.unpacking.definition import unpack

    names = unpack.arg_names
    source = ASTSource(
        fn=unpack,
        signature=dict(zip(names, TYPES)) | {"BLOCK": "constexpr"},
        constexprs={(names.index("BLOCK"),): BLOCK},
        attrs={(place,): [["tt.divisibility", ALIGNMENT]] for place, kind in enumerate(TYPES) if kind[0] == "*"},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": WARPS})
    about = made.metadata
    assert (about.global_scratch_size, about.profile_scratch_size) == (0, 0), about
    assert about.shared <= 48 << 10, about
    return zlib.compress(made.asm["cubin"], 9), {"symbol": about.name, "shared": about.shared, "warps": about.num_warps}


def source_digest() -> str:
    """sha256 of what the machine code is made of."""
    return hashlib.sha256(SOURCE.read_bytes() + repr((BLOCK, WARPS)).encode()).hexdigest()


def main() -> None:
    import triton

    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # smaller, and no paths of this machine
    entries, body = {}, b""
    for architecture in ARCHITECTURES:
        code, entry = compiled(architecture)
        entries[str(architecture)] = entry | {"start": len(body), "size": len(code)}
        body += code
        print(f"sm_{architecture}: {len(code) / 1024:.1f} KiB, {entry}")
    about = {"source": source_digest(), "compiler": f"triton {triton.__version__}", "architectures": entries}
    header = json.dumps(about).encode()
    FILE.write_bytes(len(header).to_bytes(8, "little") + header + body)


if __name__ == "__main__":
    main()
