"""Single files: in every layout the tensors are the known ones, under their published names."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.support import NANO
from tests.support import weight_formats as support
from zimage_runner.weights.formats.checkpoint_file import CheckpointFile, ComponentTensors, open_checkpoint_file
from zimage_runner.weights.formats.decode import PublishedTensor

Weights = support.Weights


@functools.cache
def transformer() -> Weights:
    return support.transformer(support.NARROW)


def qwen() -> Weights:
    return {name.removeprefix("model."): tensor for name, tensor in support.text_encoder().items()}


def assert_holds(file: CheckpointFile, component: str, weights: Weights) -> None:
    found = ComponentTensors(file.components[component])
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def one_dimensional(weights: Weights) -> Weights:
    return {name: tensor[0] if name.endswith("pad_token") else tensor for name, tensor in weights.items()}


def with_junk(weights: Weights) -> Weights:
    return {**weights, "norm_final.weight": torch.zeros(2304, dtype=torch.bfloat16)}


LAYOUTS = {
    "ComfyUI": lambda: support.comfyui(transformer()),
    "ComfyUI, model.diffusion_model.": lambda: support.comfyui(transformer(), "model.diffusion_model."),
    "ComfyUI, diffusion_model.": lambda: support.comfyui(transformer(), "diffusion_model."),
    "ComfyUI, pad tokens of one dimension": lambda: one_dimensional(support.comfyui(transformer())),
    "ComfyUI, leftover of Lumina 2": lambda: with_junk(support.comfyui(transformer())),
    "diffusers": transformer,
    "diffusers, model.diffusion_model.": lambda: {f"model.diffusion_model.{n}": t for n, t in transformer().items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformer_files_hold_the_known_weights(layout: str, tmp_path: Path) -> None:
    file = open_checkpoint_file(support.write(tmp_path / "z.safetensors", LAYOUTS[layout]()))
    assert_holds(file, "transformer", transformer())
    assert file.missing == ["text_encoder", "vae"]
    component = file.components["transformer"]
    assert (component.layout, component.precision) == (layout.split(",")[0], "bf16")
    expected = {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 256, "in_channels": 16}
    assert component.config.items() >= expected.items()


def test_all_in_one_file(tmp_path: Path) -> None:
    vae = support.vae()
    weights = support.comfyui(transformer(), "model.diffusion_model.") | support.ldm(vae, 3, "vae.")
    weights |= {f"text_encoders.qwen3_4b.transformer.{name}": t for name, t in support.text_encoder().items()}
    file = open_checkpoint_file(support.write(tmp_path / "all.safetensors", weights))
    assert file.missing == []
    assert_holds(file, "transformer", transformer())
    assert_holds(file, "text_encoder", qwen())
    assert_holds(file, "vae", vae)


def test_text_encoder_file_with_and_without_its_tied_head(tmp_path: Path) -> None:
    weights = support.text_encoder()
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    for name, extra in (("plain", {}), ("head", head)):
        file = open_checkpoint_file(support.write(tmp_path / f"{name}.safetensors", weights | extra))
        assert_holds(file, "text_encoder", qwen())
    config = file.components["text_encoder"].config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 64)
    assert (config["num_hidden_layers"], config["rope_theta"]) == (2, 1e6)


@pytest.mark.parametrize("layout", ["LDM", "diffusers"])
def test_vae_files_hold_the_known_weights_and_their_config_builds_the_model(layout: str, tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = support.vae()
    weights = support.ldm(vae, 3) if layout == "LDM" else vae
    file = open_checkpoint_file(support.write(tmp_path / "ae.safetensors", weights))
    assert_holds(file, "vae", vae)
    component = file.components["vae"]
    assert component.layout == layout
    with torch.device("meta"):
        model = AutoencoderKL.from_config(component.config)
    assert isinstance(model, AutoencoderKL)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {n: tuple(t.shape) for n, t in vae.items()}


def test_transformer_config_builds_diffusers_model(tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    file = open_checkpoint_file(support.write(tmp_path / "z.safetensors", support.comfyui(transformer())))
    with torch.device("meta"):
        model = ZImageTransformer2DModel.from_config(file.components["transformer"].config)
    assert isinstance(model, ZImageTransformer2DModel)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == dict(support.NARROW)


def test_the_base_fills_in_what_shapes_do_not_tell(nano_configs: Mapping[str, dict], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    nano = NANO
    weights = load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors")
    path = support.write(tmp_path / "nano.safetensors", support.comfyui(weights))
    file = open_checkpoint_file(path, nano_configs)
    assert_holds(file, "transformer", weights)
    published = {name: value for name, value in nano_configs["transformer"].items() if name != "_diffusers_version"}
    assert file.components["transformer"].config == published
    for component in ("text_encoder", "vae"):
        (stored,) = (nano / component).glob("*.safetensors")
        found = open_checkpoint_file(stored, nano_configs).components[component].config
        shared = found.keys() & nano_configs[component].keys() - {"architectures"}
        assert {name: found[name] for name in shared} == {name: nano_configs[component][name] for name in shared}


@pytest.fixture
def nano_configs() -> Mapping[str, dict]:
    nano = NANO
    return {
        c: json.loads((nano / c / "config.json").read_text(encoding="utf-8"))
        for c in ("transformer", "text_encoder", "vae")
    }


def test_plain_tensors_are_stretches_of_the_file(tmp_path: Path) -> None:
    path = support.write(tmp_path / "z.safetensors", support.comfyui(transformer()))
    component = open_checkpoint_file(path).components["transformer"]
    weights = component.file()
    data = path.read_bytes()
    for name, tensor in transformer().items():
        info = weights.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", tuple(tensor.shape))
        stored = torch.frombuffer(bytearray(data[info.start : info.start + info.nbytes]), dtype=torch.bfloat16)
        assert torch.equal(stored.reshape(info.shape), tensor)


def test_other_float_widths_and_the_wanted_dtype(tmp_path: Path) -> None:
    weights = support.comfyui({name: tensor.float() for name, tensor in transformer().items()})
    weights["final_layer.linear.bias"] = weights["final_layer.linear.bias"].half()
    component = open_checkpoint_file(support.write(tmp_path / "z.safetensors", weights)).components["transformer"]
    assert component.precision == "fp32 (64 tensors), fp16 (1 tensors)"
    for name in ("layers.0.attention.to_k.weight", "cap_pad_token"):
        assert torch.equal(component.tensors[name].read(torch.bfloat16), transformer()[name])


@pytest.mark.parametrize("chunk", [1, 5000, 2**24])
def test_reading_in_pieces_gives_the_whole(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = support.write(tmp_path / "z.safetensors", support.comfyui(transformer()))
    tensor: PublishedTensor = (
        open_checkpoint_file(path).components["transformer"].tensors["layers.1.attention.to_v.weight"]
    )
    monkeypatch.setattr("zimage_runner.weights.formats.decode.CHUNK", chunk)
    assert sum(piece.numel() for piece in tensor.pieces()) == math.prod(tensor.shape)
    assert torch.equal(tensor.read(), transformer()[tensor.name])


def test_description_says_in_a_few_lines_what_a_file_is(tmp_path: Path) -> None:
    path = support.write(tmp_path / "z.safetensors", support.comfyui(transformer(), "model.diffusion_model."))
    lines = open_checkpoint_file(path).description()
    assert lines[0] == f"file: {path}"
    assert "transformer: ComfyUI layout, prefix model.diffusion_model., bf16" in lines
    assert "  dim 256, 2 layers, 1 + 1 refiner layers, 2 heads, caption features 256: 73 tensors" in lines
    assert lines[-1] == "not in the file: text_encoder, vae, tokenizer, scheduler"
    assert len(lines) <= 10


def test_opening_and_describing_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = support.write(tmp_path / "z.safetensors", support.comfyui(transformer()))
    code = (
        "import sys; from pathlib import Path\n"
        "from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file\n"
        "import zimage_runner.weights.adapters.reader\n"
        f"open_checkpoint_file(Path({str(path)!r})).description()\n"
        "assert not {'torch', 'numpy', 'gguf', 'safetensors', 'hydra'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
