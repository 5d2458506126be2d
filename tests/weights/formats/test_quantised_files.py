"""Quantised files: what is read is what the format's definition says that the stored bytes mean.

Where a format rounds, the numbers that the encoder (tests.support.weight_formats) says it kept are the right ones,
exactly; they are also compared with the weights from before, to the format's own step.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from tests.support import quantised_layouts as layouts
from tests.support import weight_formats as support
from tests.support.quantised_layouts import Encode, cast, convrot, fp8_e5m2, int8, scaled
from zimage_runner.errors import UserError
from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file
from zimage_runner.weights.formats.decode import hadamard

Weights = support.Weights


@functools.cache
def original() -> Weights:
    return support.transformer()


FORMATS: dict[str, tuple[Encode, float, float]] = {
    "fp8_scaled, old, scalar": (scaled("scale_weight", False, None, "scale_input"), 2**-4, 1 / 448),
    "fp8_scaled, new, scalar": (
        scaled("weight_scale", False, {"format": "float8_e4m3fn"}, "input_scale"),
        2**-4,
        1 / 448,
    ),
    "fp8_scaled, new, rows": (scaled("weight_scale", True, {"format": "float8_e4m3fn"}), 2**-4, 1 / 448),
    "fp8_scaled, e5m2": (fp8_e5m2, 2**-3, 1 / 448),
    "fp8 cast": (cast, 2**-4, 1 / 64),
    "int8, tensor": (int8(False), 0.0, 1 / 150),
    "int8, rows": (int8(True), 0.0, 1 / 150),
    "int8, rows, flat": (int8(True, flat=True), 0.0, 1 / 150),
    "int8 convrot": (convrot(), 0.0, 1 / 40),
    "nvfp4": (support.nvfp4, 0.0, 1 / 5),
    "mxfp8": (support.mxfp8, 2**-4, 1 / 448),
}
"""Name -> (encoder; how far a number may be from the weight: of itself, and of the tensor's largest)."""
QUANTISED = tuple(f"layers.1.{part}.weight" for part in ("attention.qkv", "attention.out", "feed_forward.w2"))
PRECISION = {"old": "fp8 e4m3 scaled", "new": "fp8 e4m3 scaled", "e5m2": "fp8 e5m2 scaled", "fp8 cast": "fp8 e4m3 cast",
             "convrot": "int8 convrot", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}  # fmt: skip


def encoded(encode: Encode, prefix: str = "") -> tuple[Weights, Weights]:
    return layouts.encoded(original(), encode, lambda name, _: name in QUANTISED, prefix)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_read_as_they_are_defined(kind: str, tmp_path: Path) -> None:
    encode, relative, absolute = FORMATS[kind]
    tensors, meant = encoded(encode)
    if kind.startswith("fp8_scaled, old"):
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    component = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors)).components["transformer"]
    assert set(component.tensors) == set(meant)
    for name, value in meant.items():
        found = component.tensors[name].read()
        if "convrot" in kind and found.dtype == torch.float32:  # a product with the matrix sums in another order
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, value), name
        if found.dtype == torch.float32:
            weight = original()[name].float()
            assert ((found - weight).abs() <= relative * weight.abs() + absolute * weight.abs().max()).all()
    assert any(tensor.info is None for tensor in component.tensors.values())
    expected = next((text for key, text in PRECISION.items() if key in kind), "int8 scaled")
    assert component.precision == f"bf16 (62 tensors), {expected} (3 tensors)"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("keys_have_prefix", [True, False])
def test_formats_in_the_header_instead_of_markers(prefix: str, keys_have_prefix: bool, tmp_path: Path) -> None:
    tensors, meant = encoded(convrot(), prefix)
    layers = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    entry = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    keys = layers if keys_have_prefix else {layer.removeprefix(prefix) for layer in layers}
    metadata = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(sorted(keys), entry)})}
    file = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors, metadata))
    found = file.components["transformer"].tensors["layers.1.attention.to_v.weight"].read()
    torch.testing.assert_close(found, meant["layers.1.attention.to_v.weight"], rtol=1e-5, atol=1e-6)


def test_rows_read_by_themselves_are_the_whole_ones_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runner.weights.formats.decode.CHUNK", 100 * 768)
    for kind in ("fp8_scaled, new, rows", "nvfp4", "mxfp8"):
        tensors, meant = encoded(FORMATS[kind][0])
        component = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors)).components["transformer"]
        for name in ("layers.1.attention.to_k.weight", "layers.1.feed_forward.w2.weight"):
            assert torch.equal(component.tensors[name].read(torch.bfloat16), meant[name].bfloat16())


def test_pre_quant_scale_multiplies_the_columns(tmp_path: Path) -> None:
    tensors, meant = encoded(support.nvfp4)
    columns = torch.rand(768) + 0.5
    tensors["layers.1.attention.out.pre_quant_scale"] = columns
    file = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors))
    name = "layers.1.attention.to_out.0.weight"
    assert torch.equal(file.components["transformer"].tensors[name].read(), meant[name] * columns)


def test_an_unquantised_layer_may_have_a_scale_of_one(tmp_path: Path) -> None:
    tensors = support.comfyui(original())
    tensors["layers.0.attention.out.scale_weight"] = torch.tensor(1.0)
    file = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors))
    name = "layers.0.attention.to_out.0.weight"
    assert torch.equal(file.components["transformer"].tensors[name].read(torch.bfloat16), original()[name])


def test_a_quantised_text_encoder(tmp_path: Path) -> None:
    weights = support.text_encoder()
    name = "model.layers.0.mlp.up_proj"
    values, scale = support.fp8(weights.pop(f"{name}.weight"))
    weights |= {f"{name}.weight": values, f"{name}.weight_scale": scale}
    weights[f"{name}.comfy_quant"] = support.marker(format="float8_e4m3fn", full_precision_matrix_mult=True)
    file = open_checkpoint_file(support.write(tmp_path / "t.safetensors", weights))
    found = file.components["text_encoder"].tensors["layers.0.mlp.up_proj.weight"].read()
    assert torch.equal(found, values.float() * scale)


def test_the_rotation_is_its_own_inverse() -> None:
    matrix = hadamard(256)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(256))


OUT = "layers.0.attention.out"
ONES = torch.ones(256, 256)
BAD: dict[str, tuple[Weights, str]] = {
    "nunchaku": ({f"{OUT}.qweight": ONES.char()}, "is quantised by GPTQ, AWQ or AutoRound (layers.0.attention.out.qw"),
    "svdquant": ({f"{OUT}.wscales": ONES}, "is quantised by nunchaku (SVDQuant)"),
    "bitsandbytes": ({f"{OUT}.weight.absmax": ONES}, "is quantised by bitsandbytes (layers.0.attention.out.weight.abs"),
    "nf4 state": ({f"{OUT}.weight.quant_state.bitsandbytes__nf4": ONES}, "is quantised by bitsandbytes"),
    "sdnq": ({f"{OUT}.zero_point": ONES}, "is quantised by SDNQ"),
    "sdnq, symmetric": ({f"{OUT}.weight": ONES.char(), f"{OUT}.scale": torch.ones(256, 1)}, "is quantised by SDNQ"),
    "quanto": ({f"{OUT}.weight._data": ONES.char()}, "is quantised by quanto"),
    "asym": ({f"{OUT}.weight_codebook": torch.ones(16)}, "is quantised by ComfyUI's asym_w4a8_int8"),
    "rare format": (
        {f"{OUT}.weight": ONES.char(), f"{OUT}.comfy_quant": support.marker(format="convrot_w4a4")},
        "layers.0.attention.out.weight has the format 'convrot_w4a4', which is not supported",
    ),
    "marker and dtype": (
        {f"{OUT}.comfy_quant": support.marker(format="nvfp4")}, "is marked nvfp4 and stored as BF16"
    ),
    "marker": ({f"{OUT}.comfy_quant": torch.tensor([123, 1], dtype=torch.uint8)}, "comfy_quant cannot be read as"),
    "long marker": ({f"{OUT}.comfy_quant": torch.zeros(9000, dtype=torch.uint8)}, "has 9000 bytes, which is absurd"),
    "no weight": ({"layers.0.rotary.comfy_quant": support.marker(format="nvfp4")}, "is marked as quantised, and"),
    "no scale": ({f"{OUT}.weight": ONES.char()}, "is int8_tensorwise and its weight_scale is missing"),
    "block scales": (
        {f"{OUT}.weight": ONES.char(), f"{OUT}.weight_scale": torch.ones(6, 6)},
        "weight_scale of layers.0.attention.out.weight is F32 [6, 6]: need one float for the tensor or one for each of",
    ),
    "packed": ({f"{OUT}.weight": ONES.byte()}, "is packed (U8) in a way that is not known"),
    "nvfp4 tiles": (
        {f"{OUT}.weight": torch.ones(256, 128, dtype=torch.uint8), f"{OUT}.weight_scale_2": torch.ones(()),
         f"{OUT}.weight_scale": torch.ones(256, 8).to(torch.float8_e4m3fn)},
        "is nvfp4 [256, 256] and its weight_scale F8_E4M3 [256, 8]: need F8_E4M3 for every 16 columns, in tiles",
    ),
    "group": (
        {f"{OUT}.weight": ONES.char(), f"{OUT}.weight_scale": torch.ones(256, 1),
         f"{OUT}.comfy_quant": support.marker(format="int8_tensorwise", convrot=True, convrot_groupsize=100)},
        "convrot_groupsize=100 must be a power of 4 that divides its 256 columns",
    ),
    "two scales": (
        {f"{OUT}.weight_scale": torch.ones(()), f"{OUT}.scale_weight": torch.ones(())}, "attention.out has both"
    ),
    "stray scale": ({"layers.0.rotary.weight_scale": torch.ones(())}, "1 tensor belongs to no part of Z-Image: "),
    "integers": ({f"{OUT}.weight": ONES.long()}, "is I64, which is no weight of a known format"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_other_and_broken_quantisations_are_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, text = BAD[case]
    path = support.write(tmp_path / "q.safetensors", support.comfyui(support.transformer(support.NARROW)) | tensors)
    with pytest.raises(UserError) as caught:
        open_checkpoint_file(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path: Path) -> None:
    tensors = support.comfyui(support.transformer(support.NARROW)) | {f"{OUT}.weight_scale": torch.tensor(torch.nan)}
    file = open_checkpoint_file(support.write(tmp_path / "q.safetensors", tensors))
    with pytest.raises(UserError, match=r"weight_scale of layers\.0\.attention\.out\.weight is not finite"):
        file.components["transformer"].tensors["layers.0.attention.to_out.0.weight"].read()
