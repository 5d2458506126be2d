"""Adapters of the embedded model, from one known difference of weights, and the checkpoint that has it merged in."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support import NANO
from tests.support.adapter_layouts import Known
from zimage_runner.sampling import Lora

Weights = dict[str, torch.Tensor]

RANK = 4
BLOCKS = ("layers.0", "layers.3", "noise_refiner.0", "context_refiner.0")
MODULES = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@functools.cache
def stored(name: str = TRANSFORMER) -> Weights:
    """A component's weights as they are stored."""
    return load_file(NANO / name)


@functools.cache
def known(seed: int = 1, size: float = 0.2) -> Known:
    """A change of rank 4 of attention, feed-forward and adaLN in every kind of block."""
    generator = torch.Generator().manual_seed(seed)
    up, down = {}, {}
    for module in (f"{block}.{module}" for block in BLOCKS for module in MODULES):
        if f"{module}.weight" in stored():
            rows, columns = stored()[f"{module}.weight"].shape
            up[module] = torch.randn(rows, RANK, generator=generator) * size
            down[module] = torch.randn(RANK, columns, generator=generator) * size
    return Known(up, down)


def merged_checkpoint(folder: Path, change: Known, strength: float = 1.0) -> Path:
    """The embedded model with the change in its transformer's weights, which are float32."""
    shutil.copytree(NANO, folder)
    weights = {name: tensor.float() for name, tensor in stored().items()}
    for module in change.up:
        weights[f"{module}.weight"] += strength * change.difference(module)
    save_file(weights, folder / TRANSFORMER, {"format": "pt"})
    return folder


def full_difference(change: Known) -> Weights:
    """The change as it is added to the weights: float32 sums are the same to the last bit."""
    return {f"diffusion_model.{module}.diff": change.difference(module) for module in change.up}


def low_rank(change: Known) -> Weights:
    """The change as most trainers write it."""
    tensors: Weights = {}
    for module in change.up:
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": change.down[module], f"{name}.lora_up.weight": change.up[module]}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def text_encoder_adapter(seed: int = 1) -> Weights:
    """A LoRA of the text encoder alone: its first and its last layer, which is never computed."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Weights = {}
    weights = {name.removeprefix("model."): tensor for name, tensor in stored(TEXT_ENCODER).items()}
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for layer, module in ((0, "self_attn.k_proj"), (0, "mlp.up_proj"), (last, "mlp.up_proj")):
        rows, columns = weights[f"layers.{layer}.{module}.weight"].shape
        name = f"text_encoder.layers.{layer}.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return tensors


def written(path: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> Path:
    """The file, of these tensors."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def lora(path: Path, weight: float = 1.0) -> Lora:
    """The adapter as a plan would have it."""
    from zimage_runner.weights.adapters.find import read_checked

    file = read_checked(path, "test")
    encodes = "text_encoder" in file.components
    return Lora(
        digest=file.sha256, weight=weight, name=path.stem, path=str(path), hash=file.tensors[:12], encodes=encodes
    )
