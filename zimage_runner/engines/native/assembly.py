"""A checkpoint directory: its description, and its networks into a NativeModel, all together or one by one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from zimage_runner.engines.native.controlnet import ControlNet
from zimage_runner.engines.native.loading import (
    CONTROLNET_RULES,
    CONTROLNET_UNUSED,
    TEXT_ENCODER_RULES,
    TEXT_ENCODER_UNUSED,
    TRANSFORMER_RULES,
    TRANSFORMER_UNUSED,
    VAE_ENCODER_RULES,
    VAE_ENCODER_UNUSED,
    VAE_RULES,
    VAE_UNUSED,
    TensorFiles,
    assign,
    in_place,
    open_parts,
    open_tensors,
)
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.quantised import FP8
from zimage_runner.engines.native.sampler import read_shift
from zimage_runner.engines.native.streamed_encoder import StreamedTextEncoder
from zimage_runner.engines.native.text_encoder import TextEncoder, TextEncoderConfig
from zimage_runner.engines.native.token_table import TokenTable
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.engines.native.transformer import Transformer, TransformerConfig
from zimage_runner.engines.native.vae_decoder import VaeConfig, VaeDecoder
from zimage_runner.engines.native.vae_encoder import VaeEncoder
from zimage_runner.errors import UserError
from zimage_runner.weights.find.controlnet import ControlNetFile
from zimage_runner.weights.formats.controlnet import Refiner
from zimage_runner.weights.formats.source import source_component
from zimage_runner.weights.prepared.as_stored import StoredFp8

M = TypeVar("M", bound=torch.nn.Module)
LoadedTensors = Callable[[str], "Mapping[str, torch.Tensor] | None"]
"""A component's tensors where they are on the device already; None to read its files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The three networks' configurations and the scheduler's static shift."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig
    shift: float


def describe(path: Path) -> Description:
    """Read a diffusers-format directory. Raises UserError for a missing file, ValueError for an unsupported variant."""
    return Description(
        transformer=TransformerConfig.from_published(read_config(path / "transformer")),
        text_encoder=TextEncoderConfig.from_published(read_config(path / "text_encoder")),
        vae=VaeConfig.from_published(read_config(path / "vae")),
        shift=read_shift(read_config(path / "scheduler", "scheduler_config.json")),
    )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's configuration. Raises UserError if the file is missing."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this a diffusers-format checkpoint?") from None


def from_files(component: str) -> None:
    """LoadedTensors that has none."""


def open_model(path: Path, options: Options) -> NativeModel:
    """A NativeModel without weights. Raises UserError or ValueError for a checkpoint that is not supported."""
    return NativeModel(describe(path), CaptionTokenizer(path / "tokenizer"), options)


def load_model(
    path: Path, options: Options, loaded: LoadedTensors = from_files, published: Path | None = None
) -> NativeModel:
    """A NativeModel with all of its networks, in the order in which they are used. ``published``: as below."""
    model = open_model(path, options)
    load_text_encoder(model, path, loaded, published)
    load_transformer(model, path, loaded)
    load_vae(model, path, loaded)
    return model


def load_text_encoder(
    model: NativeModel, path: Path, loaded: LoadedTensors = from_files, published: Path | None = None
) -> None:
    """Set the model's caption encoder from the checkpoint's text_encoder folder.

    ``published``: the checkpoint as it was published, where ``path`` is a prepared copy: those hold no table of tokens.
    """
    options, config = model.options, model.description.text_encoder
    model.token_table = TokenTable(
        (published or path) / "text_encoder", config.vocab_size, config.hidden_size, options.dtype
    )
    if options.streamed:
        opened = functools.partial(open_parts, path / "text_encoder", options.device)
        model.text_encoder = StreamedTextEncoder(config, opened, options.device, options.dtype)
        return
    with torch.device("meta"):
        module = TextEncoder(config)
    tensors = component_tensors("text_encoder", path, options, loaded)
    unused = TEXT_ENCODER_UNUSED.format(last=config.num_hidden_layers - 1)
    model.text_encoder = assign(
        module, tensors, TEXT_ENCODER_RULES, unused, options.device, options.dtype, "text_encoder"
    )


def load_transformer(model: NativeModel, path: Path, loaded: LoadedTensors = from_files) -> None:
    """Set the model's transformer from the checkpoint's transformer folder."""
    options = model.options
    with torch.device("meta"):
        attention, config = model.attention, model.description.transformer
        module = Transformer(config, model.ops, attention.attend, options.arithmetic, attention.attend_fp8)
    place = module.stream_blocks(model.device) if options.streamed else in_place
    takes_fp8 = options.precision == FP8.name and not options.bf16_layers
    if takes_fp8 and (source := source_component(path / "transformer")) is not None:
        tensors = StoredFp8(source, options.device)
    elif options.streamed:
        tensors = open_parts(path / "transformer", options.device)
    else:
        tensors = component_tensors("transformer", path, options, loaded)
    kind = (options.device, options.dtype, "transformer")
    model.transformer = assign(module, tensors, TRANSFORMER_RULES, TRANSFORMER_UNUSED, *kind, place=place)
    if module.stream is not None:
        module.stream.tell()


def load_controlnet(model: NativeModel, file: ControlNetFile) -> None:
    """Set the model's ControlNet from a file that was found to fit its transformer."""
    options, attention, config = model.options, model.attention, model.description.transformer
    kinds = (model.ops, attention.attend, options.arithmetic, attention.attend_fp8, options.convention)
    with torch.device("meta"):
        module = ControlNet(file.layout, config, *kinds)
    place = module.stream_blocks(model.device) if options.streamed else in_place
    tensors, label = TensorFiles(file.files, options.device), f"the ControlNet {file.path}"
    unused = CONTROLNET_UNUSED if file.layout.refiner is Refiner.shared else "$^"
    kind = (options.device, options.dtype, label)
    model.controlnet = assign(module, tensors, CONTROLNET_RULES, unused, *kind, place=place)


def load_vae(model: NativeModel, path: Path, loaded: LoadedTensors = from_files) -> None:
    """Set the model's decoder from the checkpoint's vae folder, convolutions channels last."""
    options = model.options
    with torch.device("meta"):
        module = VaeDecoder(model.description.vae, model.ops)
    tensors = component_tensors("vae", path, options, loaded)
    module = assign(module, tensors, VAE_RULES, VAE_UNUSED, options.device, options.dtype, "vae")
    model.vae = _channels_last(module)


def load_vae_encoder(model: NativeModel, published: Path) -> None:
    """Set the model's encoder of pictures from the vae folder of the checkpoint as it was published.

    Prepared copies are of what every run needs, and do not hold it.
    """
    options = model.options
    with torch.device("meta"):
        module = VaeEncoder(model.description.vae, model.ops)
    tensors = open_parts(published / "vae", "cpu")
    kind = (options.device, options.dtype, "vae")
    model.vae_encoder = _channels_last(assign(module, tensors, VAE_ENCODER_RULES, VAE_ENCODER_UNUSED, *kind))


def _channels_last(module: M) -> M:
    """The module with the convolutions' weights in that layout."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def component_tensors(
    component: str, path: Path, options: Options, loaded: LoadedTensors
) -> Mapping[str, torch.Tensor]:
    """What ``loaded`` has, else what the component's files hold."""
    tensors = loaded(component)
    return open_tensors(path / component, options.device) if tensors is None else tensors
