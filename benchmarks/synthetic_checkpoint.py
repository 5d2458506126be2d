"""Write a synthetic Z-Image-Turbo checkpoint in the published layout, for timing without downloading 33 GB.

    python benchmarks/synthetic_checkpoint.py /data/turbo                    # fp32 transformer, 32.8 GB, as published
    python benchmarks/synthetic_checkpoint.py /data/turbo --transformer bf16 # 20.5 GB
    python benchmarks/synthetic_checkpoint.py /tmp/tiny --scale tiny         # the same layout in a few MB
    python benchmarks/synthetic_checkpoint.py /data/turbo --beside           # also comfyui.safetensors and
                                                        # controlnet.safetensors (Union 2.1), in /data, both in bf16

Names, shapes, dtypes and shards are those of the published files: modules are built on the meta device from the
published configs. Values are normal with std 1/sqrt(fan_in) (norm weights near 1), so that activations stay sane
through 30 layers; zeros would run 13 % faster than real weights. They depend on the seed, the tensor's name and the
kind of device alone. One component at a time is held in memory (24.6 GB). The tokenizer is the embedded model's: its
ids are all within the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zimage_runner.weights.find.resolve import EMBEDDED
from zimage_runner.weights.formats.names import BLOCK_MODULES, MODULES

if TYPE_CHECKING:
    import torch

TINY_SHARE = {"transformer": 0.42, "text_encoder": 0.2, "vae": 1.0}
"""Largest shard of a tiny component as a share of it: as many shards as the full one has."""
SHARD_BYTES = {"transformer": 10e9, "text_encoder": 4e9, "vae": 10e9}
"""Largest shard of each component, as published: three shards for the first two, one file for the VAE."""

TRANSFORMER: dict[str, dict[str, Any]] = {
    "full": {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    },
    "tiny": {
        "dim": 128, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64,
        "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512],
    },
}  # fmt: skip
TEXT_ENCODER: dict[str, dict[str, Any]] = {
    "full": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 5120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE: dict[str, dict[str, Any]] = {
    "full": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, **BLOCKS},
    "tiny": {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, **BLOCKS},
}


def meta_models(scale: str) -> dict[str, Any]:
    """Transformer, text encoder and VAE of the given scale, without memory."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    text_config = Qwen3Config(
        **TEXT_ENCODER[scale], max_position_embeddings=40960, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    text_config.architectures = ["Qwen3ForCausalLM"]
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(
            **TRANSFORMER[scale], all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, norm_eps=1e-5,
            qk_norm=True, rope_theta=256.0, t_scale=1000.0,
        )  # fmt: skip
        vae = AutoencoderKL(
            **VAE[scale],
            latent_channels=16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, force_upcast=True,
        )  # fmt: skip
        text_encoder = Qwen3Model(text_config)
    return {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}


def tensor_shapes(models: dict[str, Any], component: str) -> dict[str, tuple[int, ...]]:
    """Published tensor names and shapes: the text encoder's files are those of Qwen3ForCausalLM."""
    prefix = "model." if component == "text_encoder" else ""
    return {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in models[component].state_dict().items()}


def fill(name: str, shape: tuple[int, ...], dtype: str, seed: int, device: str) -> torch.Tensor:
    """The values of one tensor, on the CPU."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    # Drawn in fp32 in both cases: a bf16 checkpoint is the rounded fp32 one.
    values = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1:
        values.mul_(0.02).add_(0.0 if name.endswith("bias") else 1.0)
    else:
        gain = 0.2 if "adaLN" in name else 1.0  # gates and scales well inside tanh's straight part
        values.mul_(gain / math.sqrt(math.prod(shape[1:])))
    return values.to(kind).cpu()


def write_component(
    folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int, device: str, largest: float
) -> None:
    """Write one component's shards of at most so many bytes, with an index when there are several."""
    from huggingface_hub import save_torch_state_dict

    tensors = {name: fill(name, shape, dtype, seed, device) for name, shape in shapes.items()}
    pattern = f"{stem}{{suffix}}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=int(largest))


def write_checkpoint(target: Path, scale: str, transformer_dtype: str, seed: int, device: str) -> int:
    """Write the whole directory and return its size in bytes. ``target`` must not exist."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    models = meta_models(scale)
    target.mkdir(parents=True)
    for component, model in models.items():
        folder = target / component
        dtype = transformer_dtype if component == "transformer" else "bf16"
        item = 4 if dtype == "fp32" else 2
        shapes = tensor_shapes(models, component)
        total = sum(math.prod(shape) for shape in shapes.values()) * item
        largest = SHARD_BYTES[component] * (item / 4 if component == "transformer" else 1)
        if scale == "tiny":
            largest = total * TINY_SHARE[component]
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        save_config = model.config.save_pretrained if component == "text_encoder" else model.save_config
        save_config(folder)
        write_component(folder, stem, shapes, dtype, seed, device, largest)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_config(target / "scheduler")
    shutil.copytree(EMBEDDED / "tokenizer", target / "tokenizer")
    shutil.copyfile(EMBEDDED / "model_index.json", target / "model_index.json")
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def comfyui_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The transformer's tensors as ComfyUI's single file has them: by the table that such files are read with."""
    stacked = {part: (module, len(parts), n) for module, parts in BLOCK_MODULES.items() for n, part in enumerate(parts)}
    stacked |= {other: (module, 1, 0) for module, other in MODULES.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        part = next((part for part in stacked if name.startswith(f"{part}.") or f".{part}." in name), "")
        module, count, place = stacked.get(part, ("", 1, 0))
        if place == 0:
            found[name.replace(part, module, 1)] = (count * shape[0], *shape[1:])
    return found


def controlnet_shapes(scale: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a ControlNet in the layout of Union 2.1: every second layer, 33 channels, a refiner of its own."""
    import torch
    from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel

    config = TRANSFORMER[scale]
    with torch.device("meta"):
        model = ZImageControlNetModel(
            **{name: config[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
            control_layers_places=list(range(0, config["n_layers"], 2)),
            control_refiner_layers_places=list(range(config["n_refiner_layers"])), control_in_dim=33,
            add_control_noise_refiner="control_noise_refiner",
        )  # fmt: skip
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="directory to make; must not exist")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument(
        "--transformer", choices=("fp32", "bf16"), default="fp32", help="stored dtype (published: fp32)"
    )
    parser.add_argument("--beside", action="store_true", help="also a single file and a ControlNet, beside the target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="where values are drawn; default cuda where there is a GPU")
    args = parser.parse_args()
    if args.target.exists():
        parser.error(f"{args.target} exists: remove it or choose another directory")
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    size = write_checkpoint(args.target, args.scale, args.transformer, args.seed, device)
    if args.beside:
        transformer = comfyui_shapes(tensor_shapes(meta_models(args.scale), "transformer"))
        for stem, shapes in (("comfyui", transformer), ("controlnet", controlnet_shapes(args.scale))):
            write_component(args.target.parent, stem, shapes, "bf16", args.seed, device, 1e12)
    seconds = time.perf_counter() - began
    print(json.dumps({"path": str(args.target), "bytes": size, "seconds": round(seconds, 1), "device": device}))


if __name__ == "__main__":
    main()
