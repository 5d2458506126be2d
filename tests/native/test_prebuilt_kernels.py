"""The kernels that come with the package: made of today's source, handed to the driver as they expect it."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.engines.native import model
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.kernels import build, fused_ops, prebuilt
from zimage_runner.engines.native.kernels.prebuilt import Prebuilt, specialization
from zimage_runner.engines.native.model import Options

KEY = "swiglu(*bf16,*bf16,i32) BLOCK=2048 4"


class Driver:
    """Takes what the CUDA driver would be given."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.launches: list[tuple[Any, ...]] = []

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        assert code[:4] == b"\x7fELF"
        return 218 if self.refuses else 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert name == b"swiglu"
        ctypes.cast(function, ctypes.POINTER(ctypes.c_void_p))[0] = 4711
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *shape, stream, parameters, extra = rest
        assert (function.value, stream.value, extra) == (4711, 99, None)
        read = [ctypes.c_uint64.from_address(parameters[0]).value, ctypes.c_int32.from_address(parameters[2]).value]
        self.launches.append((*shape, len(parameters), *read))
        return 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Prebuilt:
    monkeypatch.setattr(prebuilt.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 99}))
    return Prebuilt(prebuilt.FOLDER / "sm_90.bin")


def test_every_architecture_is_there():
    assert {path.name for path in prebuilt.FOLDER.glob("*")} == {f"sm_{a}.bin" for a in build.ARCHITECTURES}


def test_files_are_made_of_todays_source(monkeypatch):
    monkeypatch.setattr(prebuilt.ctypes, "CDLL", lambda name: Driver())
    wanted = build.calls().keys()
    for made in build.built():
        remedy = "run python -m zimage_runner.engines.native.kernels.build"
        assert made.header["source"] == build.source_digest(), remedy
        assert made.entries.keys() == wanted, remedy


def test_launch_hands_over_grid_and_arguments(kernels):
    x, out = torch.zeros(2, 20480, dtype=torch.bfloat16), torch.zeros(2, 10240, dtype=torch.bfloat16)
    args = (x, out, 10240)
    key = specialization("swiglu", args, {"BLOCK": 2048}, 4)
    assert key == KEY
    assert kernels.launch(KEY, (2, 5), args)
    # x, out, hidden and two scratch pointers
    assert kernels._driver.launches == [(2, 5, 1, 128, 1, 1, 0, 5, x.data_ptr(), 10240)]


def test_what_the_machine_code_takes_for_granted_is_checked(kernels):
    x = torch.zeros(2, 20480, dtype=torch.bfloat16)
    shifted = torch.zeros(10241, dtype=torch.bfloat16)[1:]
    assert not kernels.launch(KEY, (2, 5), (x, shifted, 10240))
    assert not kernels.launch(KEY, (2, 5), (x, x, 10241))
    assert not kernels.launch("swiglu(*fp16,*fp16,i32) BLOCK=2048 4", (2, 5), (x, x, 10240))
    assert kernels._driver.launches == []


def test_a_driver_that_refuses_the_code_is_asked_once(kernels):
    kernels._driver.refuses = True
    x = torch.zeros(2, 20480, dtype=torch.bfloat16)
    assert not kernels.launch(KEY, (2, 5), (x, x, 10240))
    kernels._driver.refuses = False
    assert not kernels.launch(KEY, (2, 5), (x, x, 10240))


def test_types_without_a_kernel_have_no_key():
    assert specialization("k", (torch.zeros(1, dtype=torch.float16),), {}, 4) is None
    assert specialization("k", (2**31,), {}, 4) is None


@given(st.dictionaries(st.sampled_from(["BLOCK", "NORM", "SILU"]), st.integers(0, 4096)), st.integers(1, 8))
def test_keys_tell_constants_and_warps_apart(constants, warps):
    key = specialization("k", (1, 1.0), constants, warps)
    assert key == specialization("k", (7, 2.0), dict(constants), warps)
    assert key != specialization("k", (1, 1.0), constants, warps + 1)
    assert key != specialization("k", (1, 1.0), constants | {"MORE": 1}, warps)


def test_headers_name_the_compiler():
    raw = (prebuilt.FOLDER / "sm_90.bin").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["compiler"].startswith("triton ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_a_model_launches_is_prebuilt(dtype, nano, monkeypatch):
    """Drawn with operations that only note down what they would launch."""
    recorder = build.Recorder()
    monkeypatch.setattr(fused_ops, "kernel", recorder)
    monkeypatch.setattr(model, "choose_operations", lambda *args: fused_ops)
    native = load_model(nano, Options(dtype=dtype))
    latents = native.denoise(native.encode(["a red apple"], 512), torch.randn(1, 16, 16, 16), 2)
    native.decode(latents)
    native.decode(latents, float32=True)
    assert recorder.calls.keys() - build.calls().keys() == set()
    assert {call.name for call in recorder.calls.values()} == {call.name for call in build.calls().values()}
