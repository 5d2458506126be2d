"""A checkpoint of the embedded one's form and names, a tenth of its size, for tests that copy and convert it often."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support import NANO

CHANGES: dict[str, dict[str, Any]] = {
    "transformer": {"dim": 48, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 48},
    "text_encoder": {
        "hidden_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    },
    "vae": {"block_out_channels": [16, 32, 48, 48]},
}
"""What is smaller. It has as many layers, so that every tensor has its name."""


def write_small(folder: Path) -> Path:
    """Write it, with random weights in bfloat16, and return the folder."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3Config, Qwen3Model

    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "NOTICES", "SHA256SUMS"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for part, changes in CHANGES.items():
            (file,) = (NANO / part).glob("*.safetensors")
            config = json.loads((NANO / part / "config.json").read_text(encoding="utf-8")) | changes
            (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
            if part == "text_encoder":
                model: Any = Qwen3Model(Qwen3Config(**config))
            else:
                kind = ZImageTransformer2DModel if part == "transformer" else AutoencoderKL
                model = kind.from_config(config)
            weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
            assert weights.keys() == load_file(file).keys()
            save_file(weights, folder / part / file.name, metadata={"format": "pt"})
    return folder
