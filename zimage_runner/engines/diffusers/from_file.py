"""Modules of diffusers and transformers whose weights lie in a file of another layout or precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.weights.formats.checkpoint_file import ComponentTensors
from zimage_runner.weights.formats.source import source_component

if TYPE_CHECKING:
    import torch


def load_from_file(folder: Path, device: str, dtype: torch.dtype) -> Any | None:
    """The module of a component's folder, its weights decoded to ``dtype`` on ``device``; None where they lie in it.

    Nothing is initialised: parameters are made without memory and take the file's tensors.
    """
    component = source_component(folder)
    if component is None:
        return None
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = _MAKE[component.name](component.config)
    module.load_state_dict(dict(ComponentTensors(component, device, dtype)), assign=True)
    return module.to(device).eval().requires_grad_(False)


def _transformer(config: dict[str, Any]) -> Any:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_config(config)


def _text_encoder(config: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**config))


def _vae(config: dict[str, Any]) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_config(config)


_MAKE = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}
