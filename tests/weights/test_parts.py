"""Pictures from files of every layout: lossless ones give the repository's to the last bit, others that of the numbers
that they stand for."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.torch import load_file, save_file

from tests.support import NANO
from tests.support import weight_formats as support
from tests.support.engines import PARAMS, create, picture
from tests.support.quantised_layouts import cast, convrot, encoded, fp8_e5m2, int8, scaled, write_gguf
from zimage_runner.engines.base import Device, EngineConfig
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.model import FileModel, Model, Source, Variant
from zimage_runner.weights.find.resolve import resolve

Weights = support.Weights
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
FILES = {"transformer": TRANSFORMER, "text_encoder": "text_encoder/model.safetensors",
         "vae": "vae/diffusion_pytorch_model.safetensors"}  # fmt: skip
SMALL = replace(PARAMS, height=32, width=48, num_inference_steps=2)
CPU = NativeEngine(device=Device.cpu)


@functools.cache
def weights(component: str) -> Weights:
    return load_file(NANO / FILES[component])


def prefixed(tensors: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def all_in_one() -> Weights:
    encoder = prefixed(weights("text_encoder"), "text_encoders.qwen3_4b.transformer.model.")
    vae = support.ldm(weights("vae"), 4, "vae.")
    return support.comfyui(weights("transformer"), "model.diffusion_model.") | encoder | vae


def one_dimensional(tensors: Weights) -> Weights:
    return {name: tensor[0] if name.endswith("pad_token") else tensor for name, tensor in tensors.items()}


LOSSLESS = {
    "comfyui": lambda: support.comfyui(weights("transformer")),
    "model.diffusion_model": lambda: support.comfyui(weights("transformer"), "model.diffusion_model."),
    "diffusion_model": lambda: support.comfyui(weights("transformer"), "diffusion_model."),
    "junk": lambda: support.comfyui(weights("transformer")) | {"norm_final.weight": torch.zeros(2304)},
    "pads": lambda: one_dimensional(support.comfyui(weights("transformer"))),
    "diffusers": lambda: weights("transformer"),
    "diffusers prefixed": lambda: prefixed(weights("transformer"), "model.diffusion_model."),
    "float32": lambda: support.comfyui({name: tensor.float() for name, tensor in weights("transformer").items()}),
    "all in one": all_in_one,
}
LOSSY = {
    "fp8 cast": cast,
    "fp8 old": scaled("scale_weight", False, None, "scale_input"),
    "fp8 new": scaled("weight_scale", False, {"format": "float8_e4m3fn"}, "input_scale"),
    "fp8 rows": scaled("weight_scale", True, {"format": "float8_e4m3fn"}),
    "fp8 e5m2": fp8_e5m2,
    "int8": int8(rows=False),
    "int8 rows": int8(rows=True),
    "convrot": convrot(16),
    "nvfp4": support.nvfp4,
    "mxfp8": support.mxfp8,
}
BLOCKS = (Kind.Q8_0, Kind.Q5_1, Kind.Q4_0)


def quantised(kind: str, tensors: Weights | None = None) -> tuple[Weights, Weights]:
    """(a ComfyUI file's tensors, the published weights that they stand for)."""
    file, meant = encoded(tensors or weights("transformer"), LOSSY[kind], support.is_quantised)
    if kind == "fp8 old":
        file["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return file, meant


def decoded_blocks(tensors: Weights, kind: Kind) -> Weights:
    """What a GGUF file of these weights stands for."""
    return {
        name: torch.from_numpy(quants.dequantize(quants.quantize(tensor.float().numpy(), kind), kind))
        if support.is_quantised(name, tensor)
        else tensor
        for name, tensor in tensors.items()
    }


def folder_of(path: Path, component: str, tensors: Weights) -> Path:
    """The embedded checkpoint with other weights of one component, as a diffusers-format directory."""
    shutil.copytree(NANO, path, ignore=shutil.ignore_patterns("*.md", "NOTICES", "SHA256SUMS"))
    (path / FILES[component]).unlink()
    support.write(path / FILES[component], tensors)
    return path


def nano_file(path: Path) -> Model:
    return FileModel(name="file", source=Source.embedded, path=str(path), variant=Variant.turbo)


def drawn(model: Model | Path, config: EngineConfig = CPU) -> np.ndarray:
    """A small picture of a checkpoint, in float32 on the CPU."""
    path = model if isinstance(model, Path) else resolve(model).path
    engine = create(config, path)
    try:
        return picture(engine, SMALL)
    finally:
        engine.close()


@functools.cache
def repositorys() -> np.ndarray:
    return drawn(NANO)


@pytest.mark.parametrize("layout", LOSSLESS)
def test_a_lossless_file_gives_the_repositorys_picture(layout: str, tmp_path: Path) -> None:
    path = support.write(tmp_path / "z.safetensors", LOSSLESS[layout]())
    assert np.array_equal(drawn(nano_file(path)), repositorys())


def test_a_gguf_file_in_bf16_gives_the_repositorys_picture(tmp_path: Path) -> None:
    tensors = support.comfyui(weights("transformer"))
    path = write_gguf(tmp_path / "z.gguf", tensors, Kind.BF16, support.is_quantised)
    assert np.array_equal(drawn(nano_file(path)), repositorys())


@pytest.mark.parametrize("kind", LOSSY)
def test_a_quantised_file_gives_the_picture_of_its_numbers(kind: str, tmp_path: Path) -> None:
    tensors, meant = quantised(kind)
    got = drawn(nano_file(support.write(tmp_path / "q.safetensors", tensors)))
    expected = drawn(folder_of(tmp_path / "meant", "transformer", meant))
    # Products with convrot's matrix add up in another order than the encoder's.
    assert np.abs(got.astype(int) - expected).max() <= (1 if kind == "convrot" else 0)
    assert not np.array_equal(got, repositorys())


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_gguf_file_gives_the_picture_of_its_numbers(kind: Kind, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", support.comfyui(weights("transformer")), kind, support.is_quantised)
    expected = drawn(folder_of(tmp_path / "meant", "transformer", decoded_blocks(weights("transformer"), kind)))
    assert np.array_equal(drawn(nano_file(path)), expected)
