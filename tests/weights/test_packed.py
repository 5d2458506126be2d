"""Packed frames: bit for bit what they were, by every way of unpacking; damage is refused or harmless."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from tests.support.fake_cuda import build_fake
from tests.support.packed_values import SIZES, SPECIAL, Values, frame_of, normal
from zimage_runner.weights.packed import build, kernel
from zimage_runner.weights.packed.format import BLOCK, Counts, Frame, frame_bytes, packing_of, place_frames
from zimage_runner.weights.packed.kernel import UnpackKernel
from zimage_runner.weights.packed.pack import pack_frame
from zimage_runner.weights.packed.unpack import Unpacker, unpack_frame, unpacker
from zimage_runner.weights.preload import machine_code
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable
from zimage_runner.weights.safetensors_file import BadWeightsFile, TensorInfo, WeightsFile

Unpack = Callable[[NDArray[np.uint8], Frame], Values]


def with_torch(data: NDArray[np.uint8], frame: Frame) -> Values:
    out = torch.empty(2 * frame.values, dtype=torch.uint8)
    unpack_frame(torch.from_numpy(data), frame, out)
    return out.numpy().view(np.uint16)


def aligned(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy at a multiple of 16."""
    room = np.zeros(len(data) + 16, np.uint8)
    start = -room.ctypes.data % 16
    room[start : start + len(data)] = data
    return room[start : start + len(data)]


GUARD = 64
"""Values behind the frame's, which nobody may write."""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """The launch as it is on a GPU, with the kernel's work done by the fake driver."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc for the fake driver")
    driver = build_fake(tmp_path_factory.mktemp("cuda"))
    unpack = UnpackKernel(driver)

    def run(data: NDArray[np.uint8], frame: Frame) -> Values:
        data = aligned(data)
        out = aligned(np.full(2 * (frame.values + GUARD), 0x5A, np.uint8)).view(np.uint16)
        unpack.launch(data.ctypes.data, out.ctypes.data, frame, ctypes.c_void_p(1))
        assert (out[frame.values :] == 0x5A5A).all()
        return out[: frame.values]

    return run


def check(values: Values, *ways: Unpack) -> Counts | None:
    """Pack and unpack; the counts."""
    data, counts = pack_frame(values)
    assert len(data) == frame_bytes(len(values), counts)
    assert len(data) <= values.nbytes
    if counts is None:
        assert np.array_equal(data.view(np.uint16), values)
    for way in ways if counts is not None else ():
        assert np.array_equal(way(data, frame_of(values, counts)), values)
    return counts


@pytest.mark.parametrize("count", SIZES)
def test_weights_of_every_size(count: int, fake: Unpack) -> None:
    counts = check(normal(count), with_torch, fake)
    assert (counts is None) == (count < 64)


@pytest.mark.parametrize("scale", [2.0**-6, 2.0**-5.75, 2.0**-5.5, 2.0**-5.25])
def test_normal_weights_take_two_thirds(scale: float) -> None:
    values = normal(1 << 20, scale)
    counts = check(values)
    assert counts is not None
    assert 0.666 < frame_bytes(len(values), counts) / values.nbytes < 0.6745


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("count", [300, BLOCK, 2 * BLOCK + 5])
def test_special_values(name: str, count: int, fake: Unpack) -> None:
    assert check(np.resize(np.array(SPECIAL[name], np.uint16), count), with_torch, fake) is not None
    mixed = normal(count)
    mixed[:: max(1, count // 20)] = SPECIAL[name][0]
    assert check(mixed, with_torch, fake) is not None


@pytest.mark.parametrize("places", [[0], [-1], [BLOCK - 1, BLOCK], [BLOCK - 2, BLOCK - 1], [2 * BLOCK - 1, -1]])
@pytest.mark.parametrize("far", [0x0000, 0x7F80, 0x4100, 0x3000])
def test_far_values_at_the_ends_of_blocks(places: list[int], far: int, fake: Unpack) -> None:
    values = normal(3 * BLOCK - 9)
    values[places] = far
    assert check(values, with_torch, fake) is not None


def test_noise_is_stored_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 16, 5 * BLOCK + 3).astype(np.uint16)
    assert check(noise) is None


def test_a_block_of_noise_among_weights(fake: Unpack) -> None:
    values = normal(6 * BLOCK)
    values[BLOCK : 2 * BLOCK] = np.random.default_rng(0).integers(0, 1 << 16, BLOCK)
    assert check(values, with_torch, fake) is not None


streams = st.one_of(
    arrays.arrays(np.uint16, st.integers(1, 3 * BLOCK), elements=st.integers(0, 0xFFFF)),
    st.builds(
        lambda count, base, spread, seed: np.random.default_rng(seed)
        .integers(base, base + spread, count)
        .astype(np.uint16),
        st.integers(1, 3 * BLOCK), st.integers(0, 0xFFFF), st.integers(1, 0x2000), st.integers(0, 9),
    ),
)  # fmt: skip


@given(values=streams)
def test_any_stream_comes_back(values: Values, fake: Unpack) -> None:
    check(values, with_torch, fake)


@given(data=st.data())
def test_a_damaged_frame_is_refused_or_harmless(data: st.DataObject, fake: Unpack) -> None:
    """The driver's way writes its own values and nothing else, whatever the bytes; torch's says what is wrong."""
    values = normal(2 * BLOCK + 100)
    packed, counts = pack_frame(values)
    packed = packed.copy()
    for _ in range(data.draw(st.integers(1, 8))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    frame = frame_of(values, counts)
    assert len(fake(packed, frame)) == len(values)
    with contextlib.suppress(BadWeightsFile):
        with_torch(packed, frame)


def packed_file(counts: Any, **changes: Any) -> WeightsFile:
    """The header of a file of 2.5 frames of 2 blocks."""
    values = 5 * BLOCK
    frames = place_frames(2 * values, 2 * BLOCK, [None if c is None else tuple(c) for c in counts], 0)
    stored = sum(-(-frame.nbytes // 4096) * 4096 for frame in frames)
    tensors = {"a": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}
    packing = {"version": 1, "frame_values": 2 * BLOCK, "frames": counts, "tensors": tensors} | changes
    about = {"packing": json.dumps(packing)}
    return WeightsFile(Path("x"), 4096 + stored, 4096, {"packed": TensorInfo("U8", (stored,), 4096, stored)}, about)


GOOD = [[1000, 200, 30], None, [0, 0, 0]]


def test_frames_lie_where_the_format_says() -> None:
    packing = packing_of(packed_file(GOOD))
    assert packing is not None
    first = 16 * 2 + 2 * BLOCK + 2 * BLOCK // 4 + 250 + 50 + 30
    assert packing.frames[0] == Frame(4096, first, 0, 2 * BLOCK, (1000, 200, 30))
    assert packing.frames[1] == Frame(4096 + 3 * 4096, 4 * BLOCK, 4 * BLOCK, 2 * BLOCK, None)
    assert packing.frames[2].values == BLOCK
    assert (packing.unpacked.size, packing.unpacked.data_start) == (10 * BLOCK, 0)
    assert packing.largest_frame == 4 * BLOCK


def test_a_plain_file_has_no_packing() -> None:
    assert packing_of(WeightsFile(Path("x"), 8, 8, {}, {"format": "pt"})) is None


@pytest.mark.parametrize(
    ("counts", "changes"),
    [
        ([[8193, 0, 0], None, None], {}),  # more than there are values
        ([[10, 11, 0], None, None], {}),
        ([[10, 5, 6], None, None], {}),
        ([[-4, -4, -4], None, None], {}),
        ([[8192, 8192, 8192], None, None], {}),  # larger than unpacked
        (GOOD, {"frames": [[True, 0, 0], None, [0, 0, 0]]}),
        (GOOD, {"frames": [[1000.0, 200, 30], None, [0, 0, 0]]}),
        (GOOD, {"frames": [[1000, 200], None, [0, 0, 0]]}),
        (GOOD, {"frames": GOOD[:2]}),
        (GOOD, {"frames": [*GOOD, None]}),
        (GOOD, {"frames": [None, None, [0, 0, 0]]}),  # not the file's size
        (GOOD, {"frames": 3}),
        (GOOD, {"version": 2}),
        (GOOD, {"frame_values": 0}),
        (GOOD, {"frame_values": 100}),
        (GOOD, {"frame_values": 1 << 30}),
        (GOOD, {"frame_values": "8192"}),
        (GOOD, {"tensors": {"a": {"dtype": "F16", "shape": [20480], "data_offsets": [0, 40960]}}}),
        (GOOD, {"tensors": {"a": {"dtype": "BF16", "shape": [20480], "data_offsets": [2, 40962]}}}),
        (GOOD, {"tensors": {"a": {"dtype": "BF16", "shape": [20480]}}}),
        (GOOD, {"tensors": None}),
    ],
)
def test_impossible_tables_are_refused(counts: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(BadWeightsFile):
        packing_of(packed_file(counts, **changes))


@given(data=st.data())
def test_a_damaged_header_is_refused_or_stays_inside_the_file(data: st.DataObject) -> None:
    file = packed_file(GOOD)
    text = bytearray(file.metadata["packing"].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from(b'0123456789-[]{},:"enul '))
    try:
        packing = packing_of(dataclasses.replace(file, metadata={"packing": text.decode()}))
    except BadWeightsFile:
        return
    assert packing is not None
    place = 0
    for frame in packing.frames:
        assert file.data_start <= frame.offset
        assert frame.offset + frame.nbytes <= file.size
        assert (frame.start, frame.nbytes) == (place, frame_bytes(frame.values, frame.counts))
        place += 2 * frame.values
    assert place == packing.unpacked.size == sum(info.nbytes for info in packing.unpacked.tensors.values())


@pytest.mark.parametrize(
    "tensor", [{}, {"packed": TensorInfo("I8", (9,), 0, 9)}, {"other": TensorInfo("U8", (), 0, 1)}]
)
def test_only_one_tensor_of_bytes_is_packed(tensor: dict[str, TensorInfo]) -> None:
    file = packed_file(GOOD)
    with pytest.raises(BadWeightsFile, match="not one U8 tensor 'packed'"):
        packing_of(WeightsFile(file.path, file.size, file.data_start, tensor, file.metadata))


def test_machine_code_is_of_todays_source() -> None:
    header, start = machine_code.read_header(kernel.FILE.read_bytes())
    assert header["source"] == build.source_digest(), "run python -m zimage_runner.weights.packed.build"
    assert list(header["architectures"]) == [str(number) for number in build.ARCHITECTURES]
    assert start + sum(e["size"] for e in header["architectures"].values()) == kernel.FILE.stat().st_size


def parameters(code: bytes) -> dict[int, tuple[int, int]]:
    """(offset, bytes) of each parameter of a kernel, as its machine code's section .nv.info tells.

    Entries as cuobjdump --dump-elf prints them: EIATTR_KPARAM_INFO is 04 17, the entry's size (12), an index,
    ordinal and offset (16 bits each), then a word with the size in its highest 14 bits.
    """
    found = {}
    for match in re.finditer(rb"\x04\x17\x0c\x00\x00\x00\x00\x00(.{8})", code, re.DOTALL):
        ordinal, offset, word = struct.unpack("<HHI", match[1])
        found[ordinal] = (offset, word >> 18)
    return found


def test_machine_code_takes_the_arguments_that_the_launch_gives() -> None:
    launched: list[Any] = []

    class Driver:
        def __init__(self, architecture: int) -> None:
            self.architecture = architecture

        def capability(self) -> tuple[int, int]:
            return divmod(self.architecture, 10)

        def load_function(self, code: bytes, name: str) -> bytes:
            return code

        def launch(self, function: bytes, blocks: int, threads: int, shared: int, stream: int, arguments: Any) -> None:
            launched.append((function, threads, [ctypes.sizeof(argument) for argument in arguments]))

    for architecture in build.ARCHITECTURES:
        UnpackKernel(Driver(architecture)).launch(0, 0, frame_of(normal(BLOCK), (0, 0, 0)), 0)  # type: ignore[arg-type]
    assert len({code for code, _, _ in launched}) == len(build.ARCHITECTURES)
    for code, threads, sizes in launched:
        offsets = itertools.accumulate(sizes, initial=0)  # without gaps: what takes 8 bytes begins at a multiple of 8
        assert parameters(code) == dict(enumerate(zip(offsets, sizes)))
        # EIATTR_REQNTID: 04 10, 12 bytes: threads of a block.
        assert b"\x04\x10\x0c\x00" + struct.pack("<III", threads, 1, 1) in code


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAKE_CUDA_CAPABILITY", "75", r"compute capability 7\.5"),
        ("FAKE_CUDA_CAPABILITY", "103", r"compute capability 10\.3"),
        ("FAKE_CUDA_REFUSES_CODE", "1", "cuModuleLoadData failed with CUDA error 218"),
    ],
)
def test_where_the_kernel_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Unpack, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CudaUnavailable, match=message):
        UnpackKernel(build_fake(tmp_path))


@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "100", "120"])
def test_architectures_that_have_machine_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Unpack, capability: str
) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", capability)
    driver: CudaDriver = build_fake(tmp_path)
    assert driver.capability() == (int(capability) // 10, int(capability) % 10)
    UnpackKernel(driver)


@pytest.mark.gpu
def test_the_machine_code_on_a_gpu() -> None:
    way = unpacker(torch.device("cuda"))
    assert way is not unpack_frame

    def on_gpu(data: NDArray[np.uint8], frame: Frame, way: Unpacker = way) -> Values:
        out = torch.empty(2 * frame.values, dtype=torch.uint8, device="cuda")
        way(torch.from_numpy(data).cuda(), frame, out)
        return out.cpu().numpy().view(np.uint16)

    for count in SIZES:
        check(normal(count), on_gpu, functools.partial(on_gpu, way=unpack_frame))
