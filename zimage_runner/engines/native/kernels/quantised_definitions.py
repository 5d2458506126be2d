# pyright: reportIndexIssue=false, reportMissingImports=false
"""The kernels of eight-bit arithmetic, in Triton's language (see definitions.py).

What makes the products' inputs rounds them to eight bits before they leave the chip; what takes the products' outputs
applies their scales.

Checked against ``quantised.py`` and ``torch_ops``.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-12)
"""That of weights/eight_bits.py."""


@triton.jit
def row_scale(largest, LARGEST: tl.constexpr):
    return tl.maximum(largest, FLOOR) / LARGEST


@triton.jit
def quantise(x_ptr, out_ptr, out_scale_ptr, dim, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(x_ptr + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(x), axis=0), LARGEST)
    tl.store(out_scale_ptr + row, scale)
    tl.store(out_ptr + row * dim + columns, (x * (1 / scale)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_rms_norm_quantised(
    x_ptr, scale_ptr, out_ptr, out_scale_ptr, dim, eps,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(x_ptr + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    h = x * tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps) * scale
    own = row_scale(tl.max(tl.abs(h), axis=0), LARGEST)
    tl.store(out_scale_ptr + row, own)
    tl.store(out_ptr + row * dim + columns, (h * (1 / own)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_and_largest(sum_a, largest_a, sum_b, largest_b):
    return sum_a + sum_b, tl.maximum(largest_a, largest_b)


@triton.jit
def add_gated_norm_quantised(
    x_ptr, update_ptr, row_ptr, column_ptr, gate_ptr, scale_ptr, h_ptr, h_scale_ptr, dim, eps,
    SCALED: tl.constexpr, NORM: tl.constexpr, QUANTISED: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    place = row * dim + columns
    update = tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0)
    if SCALED:
        update *= tl.load(row_ptr + row) * tl.load(column_ptr + columns, mask=inside, other=0.0)
    x += update * tl.rsqrt(tl.sum(update * update, axis=0) / dim + eps) * gate
    # What is normed is what is stored: the rounded stream.
    stored = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + place, stored, mask=inside)
    if NORM:
        x = stored.to(tl.float32)
        h = x * tl.load(scale_ptr + columns, mask=inside, other=0.0)
        if QUANTISED:
            # Norming multiplies a row by one number: its largest magnitude is found before, in the same pass.
            squares, largest = tl.reduce((x * x, tl.abs(h)), 0, sum_and_largest)
            inverse = tl.rsqrt(squares / dim + eps)
            own = row_scale(largest * inverse, LARGEST)
            tl.store(h_scale_ptr + row, own)
            h *= inverse / own
        else:
            h *= tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_times(x_ptr, hidden, columns):
    inside = columns < hidden
    gate = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + hidden + columns, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * value


@triton.jit
def swiglu_quantised(
    x_ptr, out_ptr, out_scale_ptr, hidden, LARGEST: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    # A row in two powers of two: one that held it all would leave a third of its lanes idle.
    row = tl.program_id(0).to(tl.int64)
    first, rest = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    a = silu_times(x_ptr + row * 2 * hidden, hidden, first)
    b = silu_times(x_ptr + row * 2 * hidden, hidden, rest)
    scale = row_scale(tl.maximum(tl.max(tl.abs(a), axis=0), tl.max(tl.abs(b), axis=0)), LARGEST)
    tl.store(out_scale_ptr + row, scale)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * hidden + first, (a * (1 / scale)).to(kind), mask=first < hidden)
    tl.store(out_ptr + row * hidden + rest, (b * (1 / scale)).to(kind), mask=rest < hidden)


@triton.jit
def rescale(x_ptr, row_ptr, column_ptr, out_ptr, features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    x = tl.load(x_ptr + row * features + columns, mask=inside, other=0).to(tl.float32)
    x *= tl.load(row_ptr + row) * tl.load(column_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * features + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotated(x_ptr, dim, place, GROUPS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
    x = tl.load(x_ptr + place, mask=place < dim, other=0.0).to(tl.float32)
    for _ in tl.static_range(STAGES):
        # Sums of neighbours to the first half, differences to the second: after all stages each is where it belongs.
        first, second = tl.split(tl.reshape(x, (GROUPS, GROUP // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (GROUPS, GROUP))
    return x * tl.rsqrt(GROUP * 1.0)


@triton.jit
def rounded(x):
    # Adding and taking away this number rounds to the nearest even integer.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rotate_quantise(
    x_ptr, out_ptr, out_scale_ptr, dim,
    LARGEST: tl.constexpr, GROUPS: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # In two pieces, as swiglu_quantised; one would also take more shared memory than a kernel is given unasked.
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    rest = (GROUPS + tl.arange(0, REST))[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    a = rotated(x_ptr + row * dim, dim, first, GROUPS, GROUP, STAGES)
    b = rotated(x_ptr + row * dim, dim, rest, REST, GROUP, STAGES)
    largest = tl.maximum(tl.max(tl.max(tl.abs(a), axis=1), axis=0), tl.max(tl.max(tl.abs(b), axis=1), axis=0))
    scale = row_scale(largest, LARGEST)
    tl.store(out_scale_ptr + row, scale)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * dim + first, rounded(a * (1 / scale)).to(kind), mask=first < dim)
    tl.store(out_ptr + row * dim + rest, rounded(b * (1 / scale)).to(kind), mask=rest < dim)


@triton.jit
def qk_norm_rope_quantised(
    qkv_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tokens, heads, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)  # 0 query, 1 key, 2 value
    token = row % tokens
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, 2 * PAIRS)
    place = (row * 3 + which) * heads * HEAD_DIM + head * HEAD_DIM + channel[None, :]
    inside = (head < heads) & (channel[None, :] < HEAD_DIM)
    x = tl.load(qkv_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if which < 2:
        weight = tl.load(weight_ptr + which * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None] * weight[None, :]
        pair = tl.arange(0, PAIRS)
        angle = token * (HEAD_DIM // 2) + pair
        cos = tl.load(cos_ptr + angle, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, 2 * PAIRS))
    scale = tl.load(scale_ptr + which * heads + head, mask=head < heads, other=1.0)
    tl.store(out_ptr + place, (x / scale).to(out_ptr.dtype.element_ty), mask=inside)
