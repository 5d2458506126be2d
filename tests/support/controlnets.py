"""ControlNets of the embedded model's size, with random weights, in each published layout; and diffusers' with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support import NANO

Shapes = dict[str, tuple[int, ...]]

TRANSFORMER: dict[str, Any] = json.loads((NANO / "transformer" / "config.json").read_text(encoding="utf-8"))
LAYOUTS: dict[str, dict[str, Any]] = {
    "1.0": {"control_layers_places": [0, 3], "control_in_dim": 16, "add_control_noise_refiner": None},
    "2.0": {"control_layers_places": [0, 2, 4], "control_in_dim": 33, "add_control_noise_refiner": "control_layers"},
    "2.1": {
        "control_layers_places": [0, 2, 4], "control_in_dim": 33, "add_control_noise_refiner": "control_noise_refiner",
    },
    "lite": {"control_layers_places": [0], "control_in_dim": 33, "add_control_noise_refiner": "control_noise_refiner"},
}  # fmt: skip
"""diffusers' config fields, for six layers instead of thirty."""


def shapes_of(layout: str, layers: int, transformer: Mapping[str, Any]) -> Shapes:
    """Name and shape of each tensor that a file of this layout stores."""
    dim, refiners = transformer["dim"], transformer["n_refiner_layers"]
    channels, stored = LAYOUTS[layout]["control_in_dim"], layout != "1.0"
    shapes: Shapes = {
        "control_all_x_embedder.2-1.weight": (dim, 4 * channels),
        "control_all_x_embedder.2-1.bias": (dim,),
    }
    rows = [("control_noise_refiner", n, stored) for n in range(refiners)]
    for row, number, projects in [*rows, *(("control_layers", n, True) for n in range(layers))]:
        name = f"{row}.{number}"
        hidden, head, width = int(dim / 3 * 8), dim // transformer["n_heads"], min(dim, 256)
        block: Shapes = {f"attention.{part}.weight": (dim, dim) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        block |= {f"attention.norm_{part}.weight": (head,) for part in "qk"}
        block |= {f"{norm}.weight": (dim,) for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
        block |= {f"feed_forward.{part}.weight": (hidden, dim) for part in ("w1", "w3")}
        block |= {"feed_forward.w2.weight": (dim, hidden)}
        block |= {"adaLN_modulation.0.weight": (4 * dim, width), "adaLN_modulation.0.bias": (4 * dim,)}
        for part in ("before_proj",) * (number == 0) + ("after_proj",) if projects else ():
            block |= {f"{part}.weight": (dim, dim), f"{part}.bias": (dim,)}
        shapes |= {f"{name}.{part}": shape for part, shape in block.items()}
    return shapes


def random_tensors(layout: str) -> dict[str, torch.Tensor]:
    """As its makers store it; projections are random too, but those of Union 2.0's refiner, which is never used."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes_of(layout, len(LAYOUTS[layout]["control_layers_places"]), TRANSFORMER).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * value
        else:
            value *= (0.3 if "_proj." in name else 0.6) / shape[-1] ** 0.5
        unused = layout == "2.0" and name.startswith("control_noise_refiner.") and "_proj." in name
        tensors[name] = torch.zeros(shape) if unused else value
    return tensors


def write_controlnet(path: Path, layout: str, dtype: torch.dtype = torch.float32) -> Path:
    """A file of this layout."""
    save_file({name: value.to(dtype) for name, value in random_tensors(layout).items()}, path)
    return path


def make_controlnet(layout: str) -> Any:
    """diffusers' ZImageControlNetModel with the same weights."""
    from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel

    sizes = {name: TRANSFORMER[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    model: Any = ZImageControlNetModel(**sizes, control_refiner_layers_places=[0], **LAYOUTS[layout]).eval()
    tensors = random_tensors(layout)
    if layout == "2.0":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("control_noise_refiner.")}
    model.load_state_dict(tensors)
    return model
