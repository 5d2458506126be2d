"""Checkpoints into modules: built on the meta device, they take the stored tensors by assignment.

Nothing is initialised and nothing is copied that is already in the right dtype on the right device. Two layouts are
read: the published one (diffusers' and transformers' tensor names, one file or shards with an index) and the
modules' own, in which the matrices that are multiplied together are stored together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zimage_runner.engines.native.quantised import FORMATS, SCALE, QuantisedLinear
from zimage_runner.errors import UserError, counted
from zimage_runner.weights.formats.checkpoint_file import ComponentTensors
from zimage_runner.weights.formats.source import source_component
from zimage_runner.weights.packed.format import TENSOR as PACKED
from zimage_runner.weights.parts import packed_parts
from zimage_runner.weights.safetensors_file import BadWeightsFile

M = TypeVar("M", bound=nn.Module)

Rules = tuple[tuple[str, tuple[str, ...]], ...]
"""(pattern of a module's tensor name, the published tensors that are stacked along the first axis to make it)."""

TRANSFORMER_RULES: Rules = (
    (r"x_embedder\.(\w+)", (r"all_x_embedder.2-1.\1",)),
    (r"t_embedder_in\.(\w+)", (r"t_embedder.mlp.0.\1",)),
    (r"t_embedder_out\.(\w+)", (r"t_embedder.mlp.2.\1",)),
    (r"cap_norm", ("cap_embedder.0.weight",)),
    (r"cap_embedder\.(\w+)", (r"cap_embedder.1.\1",)),
    (r"final_modulation\.(\w+)", (r"all_final_layer.2-1.adaLN_modulation.1.\1",)),
    (r"final_linear\.(\w+)", (r"all_final_layer.2-1.linear.\1",)),
    (r"(.+\.attention)\.qkv\.weight", (r"\1.to_q.weight", r"\1.to_k.weight", r"\1.to_v.weight")),
    (r"(.+\.attention)\.norm_qk", (r"\1.norm_q.weight", r"\1.norm_k.weight")),
    (r"(.+\.attention)\.out\.(weight\w*)", (r"\1.to_out.0.\2",)),
    (r"(.+\.feed_forward)\.w1w3\.weight", (r"\1.w1.weight", r"\1.w3.weight")),
    (r"(.+_norm[12])", (r"\1.weight",)),
    (r"(.+\.adaLN_modulation)\.(\w+)", (r"\1.0.\2",)),
)
CONTROLNET_RULES: Rules = ((r"control_embedder\.(\w+)", (r"control_all_x_embedder.2-1.\1",)), *TRANSFORMER_RULES)
TEXT_ENCODER_RULES: Rules = (
    (r"(.+\.self_attn)\.qkv_proj\.weight", (r"\1.q_proj.weight", r"\1.k_proj.weight", r"\1.v_proj.weight")),
    (r"(layers\.\d+)\.gate_up_proj\.weight", (r"\1.mlp.gate_proj.weight", r"\1.mlp.up_proj.weight")),
    (r"(layers\.\d+)\.down_proj\.weight", (r"\1.mlp.down_proj.weight",)),
)
VAE_RULES: Rules = (
    (r"post_quant_conv\.(\w+)", (r"post_quant_conv.\1",)),
    (r"mid_resnets\.(.+)", (r"decoder.mid_block.resnets.\1",)),
    (
        r"mid_attention\.to_qkv\.(\w+)",
        tuple(rf"decoder.mid_block.attentions.0.to_{name}.\1" for name in "qkv"),
    ),
    (r"mid_attention\.to_out\.(\w+)", (r"decoder.mid_block.attentions.0.to_out.0.\1",)),
    (r"mid_attention\.(.+)", (r"decoder.mid_block.attentions.0.\1",)),
    (r"(up_blocks\.\d+)\.upsampler\.(\w+)", (r"decoder.\1.upsamplers.0.conv.\2",)),
    (r"(.+)", (r"decoder.\1",)),
)
VAE_ENCODER_RULES: Rules = (
    (r"quant_conv\.(\w+)", (r"quant_conv.\1",)),
    (r"(down_blocks\.\d+)\.downsampler\.(\w+)", (r"encoder.\1.downsamplers.0.conv.\2",)),
    *((pattern, tuple(re.sub("^decoder", "encoder", name) for name in names)) for pattern, names in VAE_RULES[1:]),
)

# Stored tensors that inference does not need.
TRANSFORMER_UNUSED = r"$^"
CONTROLNET_UNUSED = r"control_noise_refiner\..+"
"""Of Union 2.0, which stores a refiner that was never trained."""
TEXT_ENCODER_UNUSED = r"embed_tokens\.weight|norm\.weight|lm_head\..+|layers\.{last}\..+|.*rotary_emb\.inv_freq"
VAE_UNUSED = r"encoder\..+|quant_conv\..+"
VAE_ENCODER_UNUSED = r"decoder\..+|post_quant_conv\..+"

FUSED = ("attention.qkv.weight", "self_attn.qkv_proj.weight")
"""Endings that tell the modules' own layout from the published one."""

FLOAT32 = re.compile(r".*(norm_qk|layernorm\.weight|[qk]_norm\.weight|weight_scale)$")
"""Small vectors that the modules want in float32 whatever the compute dtype."""


EIGHT_BITS = tuple(form.dtype for form in FORMATS.values())


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one component's files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path], device: str = "cpu") -> None:
        """Raises OSError, and BadWeightsFile for a file that is not whole."""
        handles = [_opened(path, device) for path in files]
        # A causal language model's checkpoint puts everything but its head below "model.".
        self._where = {
            name.removeprefix("model."): (handle, name)
            for handle in handles
            for name in handle.keys()  # noqa: SIM118
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        handle, stored = self._where[name]
        return handle.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _opened(path: Path, device: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise BadWeightsFile(f"{path}: {error}") from error


def tensor_files(folder: Path) -> list[Path]:
    """A component's safetensors files: those its index names, else the only ones there.

    Raises UserError when there are none or the index names a file that is missing.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{indices[0]} names files that are not there: {_some(missing)}; download the model again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file: is it a component of a diffusers-format checkpoint?")
    return files


def open_tensors(folder: Path, device: str) -> Mapping[str, torch.Tensor]:
    """A component's tensors on the device.

    A prepared component arrives as a whole, as fast as the machine allows, unpacked if it is packed, and is used in
    place. A published one is read tensor by tensor: fusing copies them, and a whole file's memory would stay taken by
    its smallest tensor. One in a file elsewhere is decoded tensor by tensor.
    """
    component = source_component(folder)
    if component is not None:
        return ComponentTensors(component, device)
    tensors = TensorFiles(tensor_files(folder), device)
    is_fused = any(name.endswith(FUSED) for name in tensors)
    if set(tensors) != {PACKED} and (device == "cpu" or not is_fused):
        return tensors
    from zimage_runner.weights.load import load_tensors

    return load_tensors(tensor_files(folder), device)


def in_place(owner: nn.Module, leaf: str, value: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return value


def open_parts(folder: Path, device: str) -> Mapping[str, torch.Tensor]:
    """A component's tensors on the device, each read when it is asked for: there is no room for all of them."""
    component = source_component(folder)
    if component is not None:
        return ComponentTensors(component, device)
    files = tensor_files(folder)
    tensors = TensorFiles(files, device)
    parts = packed_parts(files[0], device) if len(files) == 1 else None
    return tensors if parts is None else parts


def assign(
    module: M,
    tensors: Mapping[str, torch.Tensor],
    rules: Rules,
    unused: str,
    device: str,
    dtype: torch.dtype,
    label: str,
    part: str = "",
    place: Callable[[nn.Module, str, torch.Tensor], torch.Tensor] = in_place,
) -> M:
    """Give every parameter of a meta-device module its tensor.

    ``part``: what the names of this module's tensors begin with, if it is a part of a component whose others are left
    alone. ``place`` is told of each tensor, its module and its name there, and says what to take instead.

    Raises UserError naming tensors that are missing, of the wrong shape, or known neither to the module nor to
    ``unused`` (a pattern of whole names): a checkpoint of another architecture must not draw quietly wrong pictures.
    """
    taken: set[str] = set()
    missing: list[str] = []
    for name, parameter in list(module.named_parameters()):
        owner, leaf = owner_of(module, name)
        if leaf == SCALE and owner.weight_scale is not parameter:
            continue  # made when its weight was rounded
        name = part + name
        sources = [name] if name in tensors else published_names(name, rules)
        absent = [source for source in sources if source not in tensors]
        missing += absent
        taken.update(sources)
        if absent:
            continue
        parts = [tensors[source] for source in sources]
        kind = _kind(name, parts[0], parameter, dtype)
        value = _gather(parts, device, kind, parameter.ndim)
        if value.shape != parameter.shape:
            shape, expected = list(value.shape), list(parameter.shape)
            raise UserError(f"{label}: {_some(sources)} has shape {shape}, its config.json says {expected}")
        if isinstance(owner, QuantisedLinear) and kind != parameter.dtype:
            owner.take(value)
            value = owner.weight.data
        setattr(owner, leaf, nn.Parameter(place(owner, leaf, value), requires_grad=False))
    if missing:
        raise UserError(f"{label}: {counted(len(missing), 'tensor is', 'tensors are')} missing: {_some(missing)}")
    extra = [] if part else [name for name in tensors if name not in taken and not re.fullmatch(unused, name)]
    if extra:
        strays = counted(len(extra), "tensor belongs", "tensors belong")
        raise UserError(f"{label}: {strays} to no known part of the model: {_some(extra)}")
    return module.eval()


def owner_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """The submodule that a parameter belongs to, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _kind(name: str, stored: torch.Tensor, parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a stored tensor is taken. Raises ValueError for eight bits that the module does not take."""
    if stored.dtype in EIGHT_BITS:
        if stored.dtype != parameter.dtype:
            raise ValueError(f"tensor {name} is stored as {stored.dtype}, wanted is {parameter.dtype}")
        return stored.dtype
    return torch.float32 if FLOAT32.match(name) else dtype


def published_names(name: str, rules: Rules) -> list[str]:
    """The published tensors that make up a module's tensor."""
    for pattern, sources in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(source) for source in sources]
    return [name]


def _gather(parts: list[torch.Tensor], device: str, dtype: torch.dtype, ndim: int) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].to(device).to(dtype)  # move, then cast: the device casts faster and fp32 links are wide
    if parts[0].ndim < ndim:
        parts = [part[None] for part in parts]
    rows = [len(part) for part in parts]
    whole = torch.empty((sum(rows), *parts[0].shape[1:]), device=device, dtype=dtype)
    for slot, part in zip(whole.split(rows), parts):
        slot.copy_(part.to(device))
    return whole


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
