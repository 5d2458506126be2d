"""Checkpoints: published and own layouts, shards, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import NANO
from tests.support.reference import captions, noise
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.loading import tensor_files
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.errors import UserError

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be changed."""
    path = tmp_path / "checkpoint"
    shutil.copytree(NANO, path)
    for file in path.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return path


def change(checkpoint: Path, component: str, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a component."""
    file = checkpoint / component / FILES[component]
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    file.unlink()
    save_file(stored, file)


def picture(model: NativeModel) -> torch.Tensor:
    return model.denoise(captions(5), noise(1, 32, 32), 2)


def test_shards_with_an_index(checkpoint: Path, native: NativeModel) -> None:
    folder = checkpoint / "transformer"
    whole = folder / FILES["transformer"]
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    whole.unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    assert torch.equal(picture(load_model(checkpoint, Options())), picture(native))

    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(UserError, match=f"files that are not there: {shard.name}"):
        load_model(checkpoint, Options())


def test_own_layout(checkpoint: Path, native: NativeModel) -> None:
    modules = {"transformer": native.transformer, "text_encoder": native.text_encoder, "vae": native.vae}
    for component, module in modules.items():
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        file = checkpoint / component / FILES[component]
        if component == "text_encoder":
            tensors |= {"embed_tokens.weight": load_file(file)["embed_tokens.weight"].clone()}
        file.unlink()
        save_file(tensors, file)
    model = load_model(checkpoint, Options())
    assert torch.equal(picture(model), picture(native))
    assert torch.equal(model.encode(["a cat"], 512)[0], native.encode(["a cat"], 512)[0])


def test_a_causal_lms_names(checkpoint: Path, native: NativeModel) -> None:
    file = checkpoint / "text_encoder" / FILES["text_encoder"]
    tensors = {f"model.{name}": tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    model = load_model(checkpoint, Options())
    assert torch.equal(model.encode(["a cat"], 512)[0], native.encode(["a cat"], 512)[0])


def test_what_inference_does_not_need_may_be_absent(checkpoint: Path, native: NativeModel) -> None:
    last = [name for name in load_file(checkpoint / "text_encoder" / FILES["text_encoder"]) if "layers.3." in name]
    change(checkpoint, "text_encoder", **dict.fromkeys([*last, "norm.weight"]))
    encoder = [n for n in load_file(checkpoint / "vae" / FILES["vae"]) if n.startswith(("encoder.", "quant_conv."))]
    change(checkpoint, "vae", **dict.fromkeys(encoder))
    assert torch.equal(picture(load_model(checkpoint, Options())), picture(native))


@pytest.mark.parametrize(
    ("component", "tensors", "text"),
    [
        ("transformer", {"layers.0.attention.to_q.weight": None}, r"1 tensor is missing: layers\.0\.attention\.to_q"),
        ("transformer", {"layers.9.ffn_norm1.weight": torch.ones(288)}, r"no known part of the model: layers\.9\.ffn"),
        ("transformer", {"controlnet.weight": torch.ones(1)}, r"no known part of the model: controlnet\.weight"),
        ("transformer", {"x_pad_token": torch.ones(1, 8)}, r"has shape \[1, 8\], its config.json says \[1, 288\]"),
        ("text_encoder", {"layers.1.mlp.up_proj.weight": None}, r"missing: layers\.1\.mlp\.up_proj\.weight"),
        ("text_encoder", {"vision.weight": torch.ones(1)}, r"no known part of the model: vision\.weight"),
        ("vae", {"decoder.conv_in.bias": None}, r"vae: 1 tensor is missing: decoder\.conv_in\.bias"),
        ("vae", {"decoder.more.bias": torch.ones(1)}, r"no known part of the model: decoder\.more\.bias"),
    ],
)
def test_checkpoints_that_are_refused(checkpoint: Path, component: str, tensors: dict, text: str) -> None:
    change(checkpoint, component, **tensors)
    with pytest.raises(UserError, match=text):
        load_model(checkpoint, Options())


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    "missing", ["transformer/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_file(checkpoint: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        load_model(checkpoint, Options())


def test_bfloat16_is_close(native: NativeModel) -> None:
    model = load_model(NANO, Options(dtype=torch.bfloat16))
    assert model.transformer.layers[0].attention.norm_qk.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    embeds = native.encode(["a red apple"], 512)
    exact = native.denoise(embeds, noise(1, 128, 128), 8)
    rough = model.denoise(model.encode(["a red apple"], 512), noise(1, 128, 128), 8)
    assert rough.dtype == torch.float32
    assert (rough - exact).square().mean().sqrt() < 0.1 * exact.std()
