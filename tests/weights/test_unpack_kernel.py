# pyright: reportIndexIssue=false
"""The kernel itself unpacks what was packed: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.packed_values import SIZES, SPECIAL, Values, frame_of, normal
from tests.support.triton_interpreter import DEVICE  # before the kernel
from zimage_runner.weights.packed.definition import unpack
from zimage_runner.weights.packed.format import BLOCK
from zimage_runner.weights.packed.pack import pack_frame

GUARD = 64


def unpacked(data: np.ndarray[Any, Any], values: int, counts: tuple[int, int, int]) -> Values:
    frame = torch.from_numpy(data.copy()).to(DEVICE)
    out = torch.full((values + GUARD,), 0x5A5A, dtype=torch.int16, device=DEVICE)
    unpack[(-(-values // BLOCK),)](frame, out, values, *counts, BLOCK=BLOCK)
    assert (out[values:] == 0x5A5A).all()
    return out[:values].cpu().numpy().view(np.uint16)


def check(values: Values) -> None:
    data, counts = pack_frame(values)
    assert counts is not None
    assert np.array_equal(unpacked(data, len(values), counts), values)


@pytest.mark.parametrize("count", [size for size in SIZES if 64 <= size <= 4 * BLOCK])
def test_weights_of_every_size(count: int) -> None:
    check(normal(count))


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str) -> None:
    check(np.resize(np.array(SPECIAL[name], np.uint16), 2 * BLOCK + 5))
    mixed = normal(BLOCK + 5)
    mixed[::37] = SPECIAL[name][0]
    check(mixed)


@pytest.mark.parametrize("seed", range(3))
def test_values_far_from_each_other(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    values = normal(3 * BLOCK)
    values[drawn.integers(0, len(values), 500)] = drawn.integers(0, 1 << 16, 500)
    check(values)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_frame_stays_inside_its_own(seed: int) -> None:
    values = normal(2 * BLOCK + 9)
    data, counts = pack_frame(values)
    assert counts is not None
    data = data.copy()
    drawn = np.random.default_rng(seed)
    table = data[: 16 * 3] if seed % 2 else data
    table[drawn.integers(0, len(table), 40)] = drawn.integers(0, 256, 40)
    assert frame_of(values, counts).nbytes == len(data)
    unpacked(data, len(values), counts)
