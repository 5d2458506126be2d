# pyright: reportIndexIssue=false, reportMissingImports=false
"""The kernels themselves, in Triton's language. Imported only where one has to be compiled (see prebuilt.py).

Statistics are in float32. Checked against ``torch_ops`` by Triton's interpreter on the CPU and on the GPU by tests.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_rms_norm(x_ptr, scale_ptr, out_ptr, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps) * scale
    tl.store(out_ptr + row + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_gated_norm(
    x_ptr, update_ptr, gate_ptr, scale_ptr, h_ptr, dim, eps, NORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    update = tl.load(update_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0)
    x += update * tl.rsqrt(tl.sum(update * update, axis=0) / dim + eps) * gate
    # What is normed is what is stored: the rounded stream.
    stored = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row + columns, stored, mask=inside)
    if NORM:
        x = stored.to(tl.float32)
        scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
        h = x * tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps) * scale
        tl.store(h_ptr + row + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def qk_norm_rope(
    qkv_ptr, weight_ptr, cos_ptr, sin_ptr, tokens, heads, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)  # 0 query, 1 key
    token = row % tokens
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, 2 * PAIRS)
    base = qkv_ptr + (row * 3 + which) * heads * HEAD_DIM
    place = base + head * HEAD_DIM + channel[None, :]
    inside = (head < heads) & (channel[None, :] < HEAD_DIM)
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + which * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None] * weight[None, :]
    pair = tl.arange(0, PAIRS)
    angle = token * (HEAD_DIM // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (HEADS, 2 * PAIRS))
    tl.store(place, turned.to(qkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(x_ptr, out_ptr, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    gate = tl.load(x_ptr + row * 2 * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + row * 2 * hidden + hidden + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value
    tl.store(out_ptr + row * hidden + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_float32(
    x_ptr, weight_ptr, bias_ptr, out_ptr, dim, outputs, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(bias_ptr + column, mask=column < outputs, other=0.0).to(tl.float32)
    for start in range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * dim + k, mask=k < dim, other=0.0)
        inside = (column[:, None] < outputs) & (k[None, :] < dim)
        weight = tl.load(weight_ptr + column[:, None] * dim + k[None, :], mask=inside, other=0.0)
        total += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
    tl.store(out_ptr + row * outputs + column, total, mask=column < outputs)


@triton.jit
def channel_sums(
    x_ptr, before_ptr, sums_ptr, rows, channels, rows_per_part, parts,
    BEFORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    # Sums are taken across rows once, at the end: a reduction in every round costs more than the loads.
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, rows_per_part, BLOCK_R):
        row = part.to(tl.int64) * rows_per_part + start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        place = x_ptr + (picture * rows + row[:, None]) * channels + channel[None, :]
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if BEFORE:
            before = tl.load(before_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
            x = tl.where(inside, x + before[None, :], 0.0)
        total += x
        squares += x * x
    place = sums_ptr + (picture * 2 * parts + part) * channels + channel
    tl.store(place, tl.sum(total, axis=0), mask=channel < channels)
    tl.store(place + parts * channels, tl.sum(squares, axis=0), mask=channel < channels)


@triton.jit
def group_affine(
    sums_ptr, before_ptr, weight_ptr, bias_ptr, affine_ptr, channels, size, parts, count, eps,
    BEFORE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    member = tl.arange(0, BLOCK_S)
    channel = group * size + member
    total = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part[:, None] < parts) & (member[None, :] < size)
        place = sums_ptr + (picture * 2 * parts + part[:, None]) * channels + channel[None, :]
        total += tl.load(place, mask=inside, other=0.0)
        squares += tl.load(place + parts * channels, mask=inside, other=0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / count
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / count - mean * mean
    inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    scale = tl.load(weight_ptr + channel, mask=member < size, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias_ptr + channel, mask=member < size, other=0.0).to(tl.float32) - mean * scale
    if BEFORE:
        shift += tl.load(before_ptr + channel, mask=member < size, other=0.0).to(tl.float32) * scale
    place = affine_ptr + picture * 2 * channels + channel
    tl.store(place, scale, mask=member < size)
    tl.store(place + channels, shift, mask=member < size)


@triton.jit
def apply_affine(
    x_ptr, affine_ptr, out_ptr, rows, channels, SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    picture = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < rows) & (channel[None, :] < channels)
    place = (picture * rows + row[:, None]) * channels + channel[None, :]
    scale = tl.load(affine_ptr + picture * 2 * channels + channel, mask=channel < channels, other=0.0)
    shift = tl.load(affine_ptr + picture * 2 * channels + channels + channel, mask=channel < channels, other=0.0)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = x * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_bias_residual(
    x_ptr, bias_ptr, residual_ptr, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < rows) & (channel[None, :] < channels)
    place = row[:, None] * channels + channel[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + place, (x + bias[None, :] + residual).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def interleave(
    phases_ptr, bias_ptr, out_ptr, row, pixels, width, positions, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (pixel[:, None] < pixels) & (channel[None, :] < channels)
    i, x = pixel // (2 * width), pixel % (2 * width)
    # Pixel (2i + row, 2j + b) is phase b at (i + row, j + b) of a grid that is one wider than the input.
    position = (i + row) * (width + 1) + (x + 1) // 2
    source = ((picture * positions + position) * 2 + x % 2) * channels
    bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    value = tl.load(phases_ptr + source[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    target = (picture * 2 * pixels + (2 * i + row) * 2 * width + x) * channels
    place = target[:, None] + channel[None, :]
    tl.store(out_ptr + place, (value + bias[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
