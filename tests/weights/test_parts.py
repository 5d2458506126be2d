"""Pictures from files of every layout: lossless ones give the repository's to the last bit, others that of the numbers
that they stand for."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.torch import load_file

from tests.support import NANO
from tests.support import weight_formats as support
from tests.support.engines import PARAMS, create, picture
from tests.support.quantised_layouts import Encode, cast, convrot, encoded, fp8_e5m2, int8, scaled, write_gguf
from zimage_runner.engines.base import Device, EngineConfig
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.assembly import describe
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.errors import UserError
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
    "ComfyUI": lambda: support.comfyui(weights("transformer")),
    "ComfyUI, model.diffusion_model.": lambda: support.comfyui(weights("transformer"), "model.diffusion_model."),
    "ComfyUI, diffusion_model., leftovers, 1-D padding": lambda: {
        **one_dimensional(support.comfyui(weights("transformer"), "diffusion_model.")),
        "diffusion_model.norm_final.weight": torch.zeros(2304),
    },
    "diffusers": lambda: prefixed(weights("transformer"), "model.diffusion_model."),
    "float32": lambda: {name: tensor.float() for name, tensor in weights("transformer").items()},
    "all in one": all_in_one,
}
LOSSY = {
    "fp8 new": scaled("weight_scale", False, {"format": "float8_e4m3fn"}, "input_scale"),
    "fp8 old": scaled("scale_weight", False, None, "scale_input"),
    "fp8 rows": scaled("weight_scale", True, {"format": "float8_e4m3fn"}),
    "fp8 cast": cast,
    "fp8 e5m2": fp8_e5m2,
    "int8": int8(rows=False),
    "int8 rows": int8(rows=True),
    "nvfp4": support.nvfp4,
    "mxfp8": support.mxfp8,
    "convrot": convrot(16),
}
"""convrot's numbers are products with a matrix, which add up in another order than the encoder's."""


def all_formats() -> Encode:
    """Encode each matrix in the next of the formats that are exact."""
    formats = itertools.cycle(encode for kind, encode in LOSSY.items() if kind != "convrot")
    return lambda weight: next(formats)(weight)


def decoded_blocks(
    tensors: Weights, is_quantised: Callable[[str, torch.Tensor], bool] = support.is_quantised
) -> Weights:
    """What a GGUF file of these weights in Q8_0 stands for."""
    kind = Kind.Q8_0
    return {
        name: torch.from_numpy(quants.dequantize(quants.quantize(tensor.float().numpy(), kind), kind))
        if is_quantised(name, tensor)
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


@pytest.mark.parametrize("kind", ["all formats", "convrot"])
def test_a_quantised_file_gives_the_picture_of_its_numbers(kind: str, tmp_path: Path) -> None:
    encode = all_formats() if kind == "all formats" else LOSSY[kind]
    tensors, meant = encoded(weights("transformer"), encode, support.is_quantised, "model.diffusion_model.")
    got = drawn(nano_file(support.write(tmp_path / "q.safetensors", tensors)))
    expected = drawn(folder_of(tmp_path / "meant", "transformer", meant))
    assert np.abs(got.astype(int) - expected).max() <= (1 if kind == "convrot" else 0)
    assert not np.array_equal(got, repositorys())


def test_a_gguf_file_gives_the_picture_of_its_numbers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", support.comfyui(weights("transformer")), Kind.Q8_0, support.is_quantised)
    expected = drawn(folder_of(tmp_path / "meant", "transformer", decoded_blocks(weights("transformer"))))
    assert np.array_equal(drawn(nano_file(path)), expected)


def text_encoder_file(path: Path, kind: str) -> tuple[Path, Weights]:
    """(a file with the text encoder, the weights that it stands for); its last layer, which is never used, is zero."""
    known = weights("text_encoder")
    quantised = {name for name, tensor in known.items() if "_proj." in name and tensor.any()}
    if kind == "gguf":
        meant = known | decoded_blocks({name: known[name] for name in quantised}, lambda *_: True)
        theirs = {llama_cpp(name): tensor for name, tensor in known.items()}
        names = {llama_cpp(name) for name in quantised}
        return write_gguf(path, theirs, Kind.Q8_0, lambda name, _: name in names, "qwen3"), meant
    file, meant = {}, dict(known)
    for name, tensor in known.items():
        if kind == "plain" or name not in quantised:
            file[f"model.{name}"] = tensor
            continue
        tensors, meant[name] = LOSSY["fp8 new"](tensor)
        file |= {f"model.{name.removesuffix('weight')}{leaf}": value for leaf, value in tensors.items()}
    return support.write(path, file), meant


def llama_cpp(name: str) -> str:
    """llama.cpp's name of a tensor of Qwen3."""
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    module = rest.removesuffix(".weight").removeprefix("self_attn.").removeprefix("mlp.")
    theirs = {
        "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
        "post_attention_layernorm": "ffn_norm", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    return f"blk.{layer}.{theirs[module]}.weight"


@pytest.mark.parametrize("kind", ["plain", "fp8", "gguf"])
def test_a_text_encoder_file(kind: str, tmp_path: Path) -> None:
    path, meant = text_encoder_file(tmp_path / "qwen.safetensors", kind)
    got = drawn(Model(name="nano", source=Source.embedded, text_encoder=str(path)))
    expected = repositorys() if kind == "plain" else drawn(folder_of(tmp_path / "meant", "text_encoder", meant))
    assert np.array_equal(got, expected)
    assert (kind == "plain") == np.array_equal(got, repositorys())


@pytest.mark.parametrize(("variant", "shift"), [(Variant.turbo, 3.0), (Variant.base, 6.0)])
def test_parts_from_everywhere(variant: Variant, shift: float, tmp_path: Path) -> None:
    """Files, a directory and a tokenizer: nothing comes from the hub, and the variant alone makes the scheduler."""
    wide = support.transformer(support.NARROW)  # with Z-Image's own heads, which no other checkpoint has to tell
    model = FileModel(
        name="file", source=Source.modelscope, offline=True, variant=variant,
        path=str(support.write(tmp_path / "z.safetensors", support.comfyui(wide))),
        vae=str(support.write(tmp_path / "ae.safetensors", support.ldm(support.vae(), 3))),
        text_encoder=str(support.write(tmp_path / "qwen.safetensors", support.text_encoder())), tokenizer=str(NANO),
    )  # fmt: skip
    found = describe(resolve(model).path)
    assert (found.shift, found.transformer.dim, found.vae.scaling_factor) == (shift, 256, 0.3611)
    assert (found.text_encoder.hidden_size, found.text_encoder.rms_norm_eps) == (256, 1e-6)


def test_a_vae_in_its_own_names_and_a_transformer_from_a_directory(tmp_path: Path) -> None:
    vae = support.write(tmp_path / "ae.safetensors", support.ldm(weights("vae"), 4))
    model = Model(name="nano", source=Source.embedded, vae=str(vae), transformer=str(NANO / "transformer"))
    assert np.array_equal(drawn(model), repositorys())


def test_diffusers_draws_from_the_same_files(tmp_path: Path) -> None:
    config = DiffusersEngine(device=Device.cpu)
    path = support.write(tmp_path / "z.safetensors", all_in_one())
    assert np.array_equal(drawn(nano_file(path), config), drawn(NANO, config))
    tensors, meant = encoded(weights("transformer"), all_formats(), support.is_quantised)
    got = drawn(nano_file(support.write(tmp_path / "q.safetensors", tensors)), config)
    assert np.array_equal(got, drawn(folder_of(tmp_path / "meant", "transformer", meant), config))


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    path = support.write(tmp_path / "z.safetensors", LOSSLESS["ComfyUI"]())
    first = resolve(nano_file(path)).digest
    moved = path.rename(tmp_path / "moved.safetensors")
    assert resolve(nano_file(moved)).digest == first
    changed = {**LOSSLESS["ComfyUI"](), "x_pad_token": torch.ones(1, 288, dtype=torch.bfloat16)}
    other = support.write(tmp_path / "other.safetensors", changed)
    assert resolve(nano_file(other)).digest != first
    base = FileModel(name="file", source=Source.embedded, path=str(moved), variant=Variant.base)
    assert resolve(base).digest != first  # another shift is another picture


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = support.write(tmp_path / "z.safetensors", LOSSLESS["ComfyUI"]())
    resolve(nano_file(path))
    support.write(path, {**LOSSLESS["ComfyUI"](), "x_pad_token": torch.ones(1, 288, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match=r"z\.safetensors was altered: sha256 .* copy it again, or accept it as it is"):
        resolve(nano_file(path))
