# pyright: reportMissingImports=false
"""Kernels that come compiled with the package: the files that hold them, which GPU takes which, how they are compiled.

A file is the length of a JSON header (8 bytes, little endian), the header, then each kernel's machine code, deflated;
the header tells where, counted from its own end. Imports neither torch nor Triton, which compiling alone needs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

ARCHITECTURES = (80, 89, 90, 100, 120)
"""A100, A10, RTX 30; L4, RTX 40; H100, H200; B200; RTX 50."""
WARP = 32
"""Threads."""
ALIGNMENT = 16
"""Bytes of addresses, and elements of widths, that the machine code takes for granted where it says so."""


def architecture_for(major: int, minor: int) -> int:
    """The architecture whose machine code a GPU of this compute capability takes, whether there is some or not."""
    # Machine code of 8.0 runs on all of 8.x, of which 8.9 has more; that of 9 and later is for its own alone.
    return 80 if (major, minor) < (8, 9) and major == 8 else 10 * major + minor


def read_header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """(a file's header, where its machine code begins)."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(bytes(data[8:begin])), begin


def code_at(data: bytes | memoryview, start: int, size: int) -> bytes:
    """A kernel's machine code, from a file's bytes."""
    return zlib.decompress(data[start : start + size])


def file_of(header: Mapping[str, Any], codes: Iterable[bytes]) -> bytes:
    """The bytes of a file."""
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *codes])


def compiled(
    function: Any,
    kinds: Iterable[str],
    constants: Mapping[str, int],
    aligned: Iterable[int],
    architecture: int,
    warps: int,
) -> tuple[bytes, dict[str, Any]]:
    """(deflated machine code of a Triton kernel, what a header says of it besides where it is).

    ``kinds``: Triton's types of the arguments that are no constants, which come last; ``aligned``: places of those that
    are multiples of ALIGNMENT. Needs no GPU.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature=dict(zip(names, kinds)) | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", ALIGNMENT]] for place in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options={"num_warps": warps})
    about = made.metadata
    # Triton's kernels take two pointers to scratch memory, for which the launches give none.
    assert (about.global_scratch_size, about.profile_scratch_size) == (0, 0), about
    assert about.shared <= 48 << 10, about
    entry = {"symbol": about.name, "shared": about.shared, "warps": about.num_warps}
    return zlib.compress(made.asm["cubin"], 9), entry


def compiler() -> str:
    """Its name and version, for the header."""
    import triton

    return f"triton {triton.__version__}"
