# pyright: reportIndexIssue=false, reportMissingImports=false
"""The kernel, in Triton's language: one program unpacks one block of a frame (see weights/packed.py).

Imported only to compile it (build.py) and to test it. It writes inside ``out`` and reads inside the frame whatever the
frame holds: places are compared with the counts, which the host has checked.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(frame_ptr, out_ptr, values, codes2, codes3, distances, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < values
    mantissa_ptr = frame_ptr + 16 * tl.num_programs(0)
    level1_ptr = mantissa_ptr + values
    level2_ptr = level1_ptr + (values + 3) // 4
    level3_ptr = level2_ptr + (codes2 + 3) // 4
    far_ptr = level3_ptr + (codes3 + 3) // 4
    row = frame_ptr.to(tl.pointer_type(tl.int32)) + 4 * block

    code = code_at(level1_ptr, place, inside)
    distance = code + 1

    left_open = inside & (code == 3)
    follower = tl.load(row + 1) + rank(left_open)
    told = left_open & (follower >= 0) & (follower < codes2)
    code = code_at(level2_ptr, follower, told)
    distance = tl.where(left_open, tl.where(code == 0, 0, code + 3), distance)

    left_open = told & (code == 3)
    follower = tl.load(row + 2) + rank(left_open)
    told = left_open & (follower >= 0) & (follower < codes3)
    code = code_at(level3_ptr, follower, told)
    distance = tl.where(left_open, code + 6, distance)

    left_open = told & (code == 3)
    follower = tl.load(row + 3) + rank(left_open)
    told = left_open & (follower >= 0) & (follower < distances)
    distance = tl.where(left_open, tl.load(far_ptr + follower, mask=told, other=0).to(tl.int32), distance)

    mantissa = tl.load(mantissa_ptr + place, mask=inside, other=0).to(tl.int32)
    exponent = (tl.load(row) - distance) & 0xFF
    value = ((mantissa & 0x80) << 8) | (exponent << 7) | (mantissa & 0x7F)
    tl.store(out_ptr + place, value.to(tl.int16), mask=inside)


@triton.jit
def code_at(level_ptr, place, wanted):
    """The code of 2 bits at each place of a level; 0 where none is wanted."""
    # Not // and %, which of a damaged frame's negative places would be negative: no number of bits to shift by.
    byte = tl.load(level_ptr + (place >> 2), mask=wanted, other=0).to(tl.int32)
    return (byte >> 2 * (place & 3)) & 3


@triton.jit
def rank(chosen):
    """How many chosen ones are before each."""
    ones = chosen.to(tl.int32)
    return tl.cumsum(ones, axis=0) - ones
