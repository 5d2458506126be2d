"""Files that look like Z-Image and are not: refused by name, before their tensors are compared one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from zimage_runner.errors import UserError, counted, one_line
from zimage_runner.weights.formats.files import StoredFile
from zimage_runner.weights.formats.names import component_of

NEED = "give a Z-Image transformer, a Qwen3-4B text encoder or FLUX's VAE"
_BY_NAME = (
    ("t_embedder_2.", "TwinFlow, a distillation of Z-Image with a second time embedding"),
    ("dec_net.", "a pixel-space relative of Z-Image (L2P, Zeta Chroma), which has no VAE"),
    ("__ming_image__", "Ming-Image, a relative of Z-Image with another text encoder"),
    ("siglip_", "Z-Image-Omni or -Edit, which also reads pictures and whose weights are not published"),
)
_OTHER_MODELS = (
    ("double_blocks.", "FLUX or HunyuanVideo"),
    ("single_transformer_blocks.", "FLUX"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("input_blocks.", "Stable Diffusion 1, 2 or XL"),
    ("cond_stage_model.", "Stable Diffusion 1 or 2"),
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("transformer_blocks.", "Qwen-Image or another model with transformer_blocks"),
)
ARCHITECTURES = {"transformer": (None, "lumina2"), "text_encoder": ("qwen3",)}
"""What GGUF files call Z-Image (city96's converter; stable-diffusion.cpp writes nothing) and its text encoder."""
_ADAPTER = re.compile(r"\.(lora_|lora\.|lokr_|hada_|oft_)|\.(dora_scale|diff|diff_b|set_weight|w_norm)$")


def refuse_relatives(file: StoredFile, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError for a model that is not Z-Image; ``shapes`` are the transformer's, names without prefix."""
    if any(name.startswith("control_layers.") for name in shapes):
        instead = f"use model.controlnet={file.path.name}"
        raise UserError(f"{file.path} is a ControlNet of Z-Image, not a checkpoint: {instead}")
    for start, model in _BY_NAME:
        _refuse(file, start, model, shapes)
    _refuse_lumina2(file, shapes)
    if not _is_transformer(shapes):
        for start, model in _OTHER_MODELS:
            _refuse(file, start, model, shapes)
        return
    if "cap_pad_token" not in shapes:
        raise UserError(f"{file.path}: cap_pad_token is missing: Ming-Image or a damaged file, not Z-Image: {NEED}")


def refuse_architecture(file: StoredFile, component: str) -> None:
    """Raise UserError for a GGUF file whose header names another model."""
    found = file.metadata.get("general.architecture")
    if file.kind == "gguf" and component in ARCHITECTURES and found not in ARCHITECTURES[component]:
        raise UserError(f"{file.path}: general.architecture is {found!r}, which is not Z-Image's {component}: {NEED}")


def is_adapter(names: Mapping[str, object]) -> bool:
    """Whether the names are those of a LoRA or another adapter."""
    return any(_ADAPTER.search(name) for name in names)


def kinds_of_names(names: Sequence[str]) -> str:
    """A few names, for messages."""
    return ", ".join(map(one_line, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_names(file: object, owner: str, whole: str, missing: Sequence[str], strays: Sequence[str]) -> None:
    """Raise UserError if ``owner`` lacks tensors, or if the file has some that belong to no part of ``whole``."""
    if missing:
        raise UserError(f"{owner} lacks {counted(len(missing), 'tensor')}: {kinds_of_names(missing)}")
    if strays:
        known = counted(len(strays), "tensor belongs", "tensors belong")
        raise UserError(f"{file}: {known} to no part of {whole}: {kinds_of_names(strays)}")


def _is_transformer(shapes: Mapping[str, Sequence[int]]) -> bool:
    return any(name.startswith("noise_refiner.") for name in shapes) and "cap_embedder.1.weight" in shapes


def _refuse(file: StoredFile, start: str, model: str, shapes: Mapping[str, Sequence[int]]) -> None:
    found = next((name for name in shapes if name.startswith(start)), None)
    if found or any(component_of(name)[1] == start for name in file.tensors):
        raise UserError(f"{file.path} is {model} ({found or start}): not supported: {NEED}")


def _refuse_lumina2(file: StoredFile, shapes: Mapping[str, Sequence[int]]) -> None:
    dim = shapes.get("x_embedder.weight", (0,))
    features = shapes.get("cap_embedder.0.weight", (0,))
    if 2304 in (*dim[:1], *features[:1]):
        raise UserError(f"{file.path} is Lumina 2 (its width is 2304), not Z-Image: not supported: {NEED}")
