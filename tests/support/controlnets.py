"""ControlNets of the embedded model's size, with random weights, in each published layout; and diffusers' with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support import NANO

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


def make_controlnet(layout: str, **changes: Any) -> Any:
    """diffusers' ZImageControlNetModel with random weights, its projections too, which are zeros before training."""
    from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel

    sizes = {name: TRANSFORMER[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    fields = {**sizes, "control_refiner_layers_places": [0], **LAYOUTS[layout], **changes}
    torch.manual_seed(0)
    model = ZImageControlNetModel(**fields).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.3 / fields["dim"] ** 0.5)
        elif name.endswith(("norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def write_controlnet(path: Path, layout: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The same as its makers store it: Union 2.0 with the refiner that was never trained, projections of zeros."""
    tensors = {
        name: value.to(dtype).contiguous() for name, value in make_controlnet(layout, **changes).state_dict().items()
    }
    if layout == "2.0":
        unused = make_controlnet("2.1").state_dict()
        for name, value in unused.items():
            if name.startswith("control_noise_refiner."):
                tensors[name] = torch.zeros_like(value, dtype=dtype) if "proj" in name else value.to(dtype)
    save_file(tensors, path)
    return path
