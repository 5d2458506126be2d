"""The kernels that come with the package: made of today's source, handed to the driver as they expect it."""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.engines.native import model
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.kernels import build, fused_ops, prebuilt
from zimage_runner.engines.native.kernels import launch as launch_module
from zimage_runner.engines.native.kernels.prebuilt import Entry, Launcher, Prebuilt, specialization
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.native.quantised import INT8, Quantised, QuantisedLinear, Scaled

KEY = "swiglu(*bf16,*bf16,i32) BLOCK=2048 4"


class Driver:
    """Takes what the CUDA driver would be given."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.launches: list[tuple[Any, ...]] = []
        self.loads = 0
        # A function of its own, which takes attributes as ctypes' do.
        self.cuLaunchKernel = lambda *args: self.launch(*args)

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        assert code[:4] == b"\x7fELF"
        self.loads += 1
        return 218 if self.refuses else 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert name == b"swiglu"
        ctypes.cast(function, ctypes.POINTER(ctypes.c_void_p))[0] = 4711
        return 0

    def launch(self, function: Any, *rest: Any) -> int:
        *shape, stream, parameters, extra = rest
        assert (function.value, stream, extra) == (4711, 99, None)
        assert len(rest) + 1 == len(prebuilt.LAUNCH_TYPES)
        read = [ctypes.c_uint64.from_address(parameters[0]).value, ctypes.c_int32.from_address(parameters[2]).value]
        self.launches.append((*shape, len(parameters), *read))
        return 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Prebuilt:
    monkeypatch.setattr(prebuilt.ctypes, "CDLL", lambda name: Driver())
    return Prebuilt(prebuilt.FOLDER / "sm_90.bin")


def test_every_architecture_is_there():
    assert {path.name for path in prebuilt.FOLDER.glob("*")} == {f"sm_{a}.bin" for a in build.ARCHITECTURES}


def test_files_are_made_of_todays_source(monkeypatch):
    monkeypatch.setattr(prebuilt.ctypes, "CDLL", lambda name: Driver())
    for architecture in build.ARCHITECTURES:
        made = prebuilt.Prebuilt(prebuilt.FOLDER / f"sm_{architecture}.bin")
        wanted = build.calls_for(architecture).keys()
        remedy = "run python -m zimage_runner.engines.native.kernels.build"
        assert made.header["source"] == build.source_digest(), remedy
        assert made.entries.keys() == wanted, remedy


def launch(kernels: Prebuilt, x: torch.Tensor, out: torch.Tensor, hidden: int, block: int = 2048) -> bool:
    return kernels.launch("swiglu", (2, 5), (x, out, hidden), {"BLOCK": block}, 4, 99)


def test_launch_hands_over_grid_and_arguments(kernels):
    x, out = torch.zeros(2, 20480, dtype=torch.bfloat16), torch.zeros(2, 10240, dtype=torch.bfloat16)
    assert specialization("swiglu", (x, out, 10240), {"BLOCK": 2048}, 4) == KEY
    other = torch.zeros_like(x)
    assert launch(kernels, x, out, 10240)
    assert launch(kernels, other, out, 768)
    # x, out, hidden and two scratch pointers
    shape = (2, 5, 1, 128, 1, 1, 0, 5)
    assert kernels._driver.launches == [(*shape, x.data_ptr(), 10240), (*shape, other.data_ptr(), 768)]
    assert kernels._driver.loads == 1


@given(arguments=st.lists(st.one_of(st.integers(-(2**31), 2**31 - 1), st.floats(width=32), st.none()), max_size=9))
def test_every_argument_lies_where_the_kernel_reads_it(arguments):
    """None stands for a tensor."""
    tensor = torch.zeros(4)
    args = [tensor if value is None else value for value in arguments]
    read: list[Any] = []

    def driver(*launched: Any) -> int:
        parameters = launched[-2]
        assert len(parameters) == len(args) + 2
        kinds = [{int: ctypes.c_int32, float: ctypes.c_float}.get(type(arg), ctypes.c_uint64) for arg in args]
        read.extend(kind.from_address(place).value for kind, place in zip([*kinds, *[ctypes.c_uint64] * 2], parameters))
        return 0

    entry = Entry(symbol="k", shared=0, warps=4, widths=(), start=0, size=0)
    assert Launcher(driver, ctypes.c_void_p(1), entry, args).launch((1,), args, 0)
    wanted = [tensor.data_ptr() if value is None else value for value in arguments]
    assert repr(read) == repr([*wanted, 0, 0])  # as text: NaN is not equal to itself


def test_what_the_machine_code_takes_for_granted_is_checked(kernels):
    x = torch.zeros(2, 20480, dtype=torch.bfloat16)
    shifted = torch.zeros(10241, dtype=torch.bfloat16)[1:]
    assert not launch(kernels, x, x, 2**40)
    for _ in range(2):
        assert not launch(kernels, x, shifted, 10240)
        assert not launch(kernels, x, x, 10241)
        assert not launch(kernels, x, x, 2**40)
        assert not launch(kernels, x, x, 10240, block=1024)
        assert not launch(kernels, x.half(), x.half(), 10240)
        assert not launch(kernels, x.float(), x, 10240)
    assert kernels._driver.launches == []
    assert launch(kernels, x, x, 10240)


def test_a_driver_that_refuses_the_code_is_asked_once(kernels):
    kernels._driver.refuses = True
    x = torch.zeros(2, 20480, dtype=torch.bfloat16)
    assert not launch(kernels, x, x, 10240)
    kernels._driver.refuses = False
    assert not launch(kernels, x, x, 10240)
    assert kernels._driver.loads == 1


def test_a_launch_that_fails_is_an_error(kernels):
    kernels._driver.launch = lambda *args: 700
    x = torch.zeros(2, 20480, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="CUDA error 700 when kernel swiglu was launched"):
        launch(kernels, x, x, 10240)


@pytest.mark.parametrize("there", [True, False])
def test_a_cuda_tensor_goes_to_the_prebuilt_kernel_first(kernels, monkeypatch, there):
    """On the stream that torch uses on the tensor's device."""

    class OnGpu(torch.Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 3

    compiled: list[Any] = []
    triton = SimpleNamespace(swiglu={(2, 5): lambda *args, **constants: compiled.append((args, constants))})
    monkeypatch.setattr(prebuilt, "for_device", lambda index: kernels if there and index == 3 else None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 96 + index, raising=False)
    monkeypatch.setattr(launch_module.importlib, "import_module", lambda name: triton)
    x = torch.zeros(2, 20480, dtype=torch.bfloat16).as_subclass(OnGpu)
    launch_module.kernel("swiglu")[2, 5](x, x, 10240, BLOCK=2048, num_warps=4)
    assert (len(kernels._driver.launches), len(compiled)) == ((1, 0) if there else (0, 1))
    if compiled:
        assert compiled[0][1] == {"num_warps": 4, "BLOCK": 2048}


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
    if dtype == torch.bfloat16:  # in eight bits too, whose products cannot use what nobody has written
        monkeypatch.setattr(QuantisedLinear, "forward", product_without_result)
        for form, attention in (("fp8", None), ("int8", None), ("fp8", lambda *args: args[2].bfloat16())):
            native = load_model(nano, Options(dtype=dtype, precision=form, bf16_layers=frozenset({5})))
            native.transformer.attend_fp8 = attention
            native.denoise(native.encode(["a red apple"], 512), torch.randn(1, 16, 16, 16), 1)
    assert recorder.calls.keys() - build.calls().keys() == set()
    names = {call.name for call in build.calls().values()}
    expected = names if dtype == torch.bfloat16 else names - EIGHT_BITS
    assert {call.name for call in recorder.calls.values()} == expected


EIGHT_BITS = {
    "quantise", "rescale", "rotate_quantise", "scaled_rms_norm_quantised", "add_gated_norm_quantised",
    "swiglu_quantised", "qk_norm_rope_quantised",
}  # fmt: skip


def product_without_result(self: QuantisedLinear, x: Quantised) -> torch.Tensor | Scaled:
    """What a product's output is like."""
    kind = torch.int32 if self.form is INT8 else torch.bfloat16
    raw = torch.zeros(*x.values.shape[:-1], len(self.weight), dtype=kind)
    scaled = Scaled(raw, x.scale, self.weight_scale, torch.bfloat16)
    return scaled if self.folded or self.form is INT8 else raw
