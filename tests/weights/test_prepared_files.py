"""Prepared copies made of files: those of the numbers that the files stand for; fp8 is taken as it is."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tests.support import NANO
from tests.support import weight_formats as support
from tests.support.quantised_layouts import Encode, convrot, encoded, int8, scaled, write_gguf
from zimage_runner.compile import Compile
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.precision import Precision
from zimage_runner.engines.request import LoadRequest
from zimage_runner.memory.policies import Staged
from zimage_runner.model import FileModel, Model, Prepare, Source, Variant
from zimage_runner.prepare import main
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.packed import format as packed
from zimage_runner.weights.packed.format import BLOCK
from zimage_runner.weights.prepared import prepare, prepared
from zimage_runner.weights.prepared.compare import compare

Weights = support.Weights
ENCODERS: dict[str, Encode] = {
    "fp8": scaled("weight_scale", False, {"format": "float8_e4m3fn"}),
    "fp8 rows": scaled("weight_scale", True, {"format": "float8_e4m3fn"}),
    "int8": int8(rows=True),
    "convrot": convrot(16),
    "nvfp4": support.nvfp4,
}
MATRIX = "layers.2.attention.qkv.weight"


@functools.cache
def original() -> Weights:
    return load_file(NANO / "transformer/diffusion_pytorch_model.safetensors")


def file_of(path: Path, encode: Encode) -> tuple[Model, Weights]:
    """(a model whose transformer is a file, the published weights that it stands for)."""
    tensors, meant = encoded(original(), encode, support.is_quantised)
    return nano_file(support.write(path, tensors)), meant


def nano_file(path: Path) -> Model:
    return FileModel(name="file", source=Source.embedded, path=str(path), variant=Variant.turbo)


def transformer_of(found: prepared.Prepared) -> Weights:
    return load_file(prepared.component_file(found.path, "transformer"))


def fused(weights: Weights, block: str = MATRIX) -> torch.Tensor:
    return torch.cat([weights[block.replace("qkv", f"to_{part}")] for part in "qkv"])


def test_the_copy_of_a_lossless_file_is_the_repositorys(tmp_path: Path) -> None:
    model = nano_file(support.write(tmp_path / "z.safetensors", support.comfyui(original(), "model.diffusion_model.")))
    found = prepare.build(resolve(model), model, packed=False)
    repository = Model(name="nano", source=Source.local, path=str(NANO))
    expected = prepare.build(resolve(repository), repository, packed=False)
    assert found.is_lossless
    for component in ("transformer", "text_encoder", "vae"):
        ours, theirs = (load_file(prepared.component_file(copy.path, component)) for copy in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.path.name == f"file-{resolve(model).digest[:16]}"


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_quantised_file_is_decoded_once(is_packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FRAME_VALUES", 64 * BLOCK)  # many frames, which cut rows in two
    formats = itertools.cycle(ENCODERS.values())
    model, meant = file_of(tmp_path / "q.safetensors", lambda weight: next(formats)(weight))
    checkpoint = resolve(model)
    found = prepare.build(checkpoint, model, packed=is_packed)
    assert not found.is_lossless
    assert compare(inspect(checkpoint.path), found).differences == []
    if not is_packed:
        got = transformer_of(found)
        for block in [name for name in got if name.endswith("attention.qkv.weight")]:
            torch.testing.assert_close(got[block], fused(meant, block).bfloat16(), rtol=2**-7, atol=1e-6)
    assert prepare.ensure_prepared(checkpoint, model, "float32") is None  # in float32 the file itself is exact


def test_a_gguf_file_is_decoded_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", support.comfyui(original()), Kind.Q8_0, support.is_quantised)
    found = prepare.build(resolve(nano_file(path)), nano_file(path), packed=False)
    assert compare(inspect(resolve(nano_file(path)).path), found).differences == []


def loaded_transformer(path: Path, checkpoint: Checkpoint, options: Options) -> dict[str, torch.Tensor]:
    """What a directory, the checkpoint's own or its copy's, gives the transformer."""
    return load_model(path, options, published=checkpoint.path).transformer.state_dict()


@pytest.mark.parametrize("kind", ["fp8", "fp8 rows"])
def test_products_in_fp8_take_the_files_own_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy and without one: the picture does not depend on it."""
    monkeypatch.setattr(packed, "FRAME_VALUES", 64 * BLOCK)
    model, meant = file_of(tmp_path / "q.safetensors", ENCODERS[kind])
    checkpoint = resolve(model)
    found = prepare.build(checkpoint, model, precision="fp8")
    assert compare(inspect(checkpoint.path), found).differences == []
    options = Options(dtype=torch.bfloat16, precision="fp8")
    direct, copied = (loaded_transformer(path, checkpoint, options) for path in (checkpoint.path, found.path))
    assert direct.keys() == copied.keys()
    for name, tensor in copied.items():
        assert direct[name].dtype == tensor.dtype
        assert torch.equal(direct[name].float(), tensor.float()), name
    numbers = direct[MATRIX].float() * direct[f"{MATRIX}_scale"][:, None]
    assert direct[MATRIX].dtype == torch.float8_e4m3fn
    assert torch.equal(numbers, fused(meant))  # nothing was rounded again


def test_layers_kept_in_bf16_come_from_the_copy_in_bf16(tmp_path: Path) -> None:
    """A copy in fp8 holds no layer in bf16, so it is not used; the others are rounded as that copy's would be."""
    model, meant = file_of(tmp_path / "q.safetensors", ENCODERS["fp8"])
    checkpoint = resolve(model)
    prepare.build(checkpoint, model, precision="fp8")
    plain = prepare.build(checkpoint, model, packed=False)
    config = NativeEngine(precision=Precision.fp8, bf16_layers=[2])
    request = LoadRequest(checkpoint=checkpoint, model=model, memory=Staged(), compile=Compile())
    weights = config._weights(request)
    assert weights.path == plain.path
    options = Options(dtype=torch.bfloat16, precision="fp8", bf16_layers=frozenset({2}))
    direct, copied = (loaded_transformer(path, checkpoint, options) for path in (checkpoint.path, weights.path))
    assert all(torch.equal(direct[name].float(), tensor.float()) for name, tensor in copied.items())
    assert torch.equal(direct[MATRIX], fused(meant).bfloat16())


def test_other_formats_are_rounded_to_eight_bits_as_bf16_is(tmp_path: Path) -> None:
    model, _ = file_of(tmp_path / "q.safetensors", ENCODERS["int8"])
    checkpoint = resolve(model)
    plain = prepare.build(checkpoint, model, packed=False)
    found = prepare.build(checkpoint, model, precision="fp8")
    options = Options(dtype=torch.bfloat16, precision="fp8")
    expected, got = (loaded_transformer(copy.path, checkpoint, options) for copy in (plain, found))
    assert all(torch.equal(got[name].float(), tensor.float()) for name, tensor in expected.items())


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = support.write(tmp_path / "z.safetensors", support.comfyui(original()))
    options = ["model=file", f"model.path={path}", "model.source=embedded", "model.variant=turbo"]
    for action, text in (
        ("info", "prepared: none; would be in"),
        ("build", "prepared: "),
        ("verify", "equals the source rounded to bfloat16"),
        ("accept", f"{path}: sha256 "),
        ("info", "file-"),
    ):
        assert main([action, *options]) == 0
        assert text in capsys.readouterr().out


def test_a_first_use_makes_the_copy_if_it_is_asked_for(tmp_path: Path) -> None:
    model = nano_file(support.write(tmp_path / "z.safetensors", support.comfyui(original())))
    checkpoint = resolve(model)
    assert prepare.ensure_prepared(checkpoint, model, "bfloat16") is None  # small: it loads in no time
    model.prepare = Prepare.always
    assert prepare.ensure_prepared(checkpoint, model, "bfloat16") is not None
