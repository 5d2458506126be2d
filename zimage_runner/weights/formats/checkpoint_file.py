"""One file's tensors under their published names, decoded when they are read; and what the file is, in some ten lines.

Opening reads headers and the few bytes of quantisation markers, and needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError, counted
from zimage_runner.weights.formats.configs import UnknownShapes, config_of, expected_shapes
from zimage_runner.weights.formats.decode import PublishedTensor, StoredTensor
from zimage_runner.weights.formats.files import StoredFile, open_stored
from zimage_runner.weights.formats.names import (
    BLOCK_MODULES,
    JUNK,
    PAD_TOKENS,
    component_of,
    ldm_levels,
    prefix_of,
    published,
    unknown_prefix,
)
from zimage_runner.weights.formats.quantised import stored_tensors
from zimage_runner.weights.formats.relatives import (
    NEED,
    is_adapter,
    kinds_of_names,
    refuse_architecture,
    refuse_names,
    refuse_relatives,
)
from zimage_runner.weights.safetensors_file import TensorInfo, WeightsFile

if TYPE_CHECKING:
    import torch

COMPONENTS = ("transformer", "text_encoder", "vae")
_PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2", "I8": "int8"}


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a file: complete, with a config that its shapes agree with."""

    name: str
    """transformer, text_encoder or vae."""
    config: dict[str, Any]
    """As its config.json; see configs.py for what shapes do not tell."""
    tensors: dict[str, PublishedTensor]
    layout: str
    """ComfyUI, diffusers, LDM, transformers or llama.cpp."""
    prefix: str
    data_start: int
    """Where the file's header ends and tensors' bytes begin."""

    @property
    def precision(self) -> str:
        """How most of its numbers are stored, for people: "fp8 e4m3 scaled (202 tensors), fp32 (251)"."""
        stored = {tensor.stored.name: tensor.stored for tensor in self.tensors.values()}.values()
        weight: Counter[str] = Counter()
        for tensor in stored:
            weight[_precision(tensor)] += math.prod(tensor.shape)
        count = Counter(_precision(tensor) for tensor in stored)
        ordered = [kind for kind, _ in weight.most_common()]
        return ordered[0] if len(ordered) == 1 else ", ".join(f"{kind} ({count[kind]} tensors)" for kind in ordered)

    def file(self) -> WeightsFile:
        """The file as if it held this component alone, under published names.

        A third of a fused matrix is a stretch of it; what must be decoded is told as what it becomes: float32 that lies
        nowhere.
        """
        tensors = {name: tensor.info or _decoded(tensor) for name, tensor in self.tensors.items()}
        path = next(iter(self.tensors.values())).stored.path
        return WeightsFile(path=path, size=path.stat().st_size, data_start=self.data_start, tensors=tensors)


def _decoded(tensor: PublishedTensor) -> TensorInfo:
    return TensorInfo("F32", tensor.shape, 0, 4 * math.prod(tensor.shape))


class ComponentTensors(Mapping[str, "torch.Tensor"]):
    """A component's tensors, each read and decoded when it is asked for: in ``dtype``, or as PublishedTensor.read."""

    def __init__(self, component: Component, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.component = component
        self.device = device
        self.dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.component.tensors[name].read(self.dtype, self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.component.tensors)

    def __len__(self) -> int:
        return len(self.component.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file with one or more components of Z-Image."""

    file: StoredFile
    components: dict[str, Component]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def missing(self) -> list[str]:
        """Components that must come from elsewhere."""
        return [name for name in COMPONENTS if name not in self.components]

    def description(self) -> list[str]:
        """What the file is, in some ten lines."""
        architecture = self.file.metadata.get("general.architecture")
        kind = f"GGUF ({architecture or 'no architecture'})" if self.file.kind == "gguf" else "safetensors"
        lines = [
            f"file: {self.path}",
            f"format: {kind}, {self.file.size / 1e9:.3f} GB, {counted(len(self.file.tensors), 'tensor')}",
        ]
        for component in self.components.values():
            prefix = f", prefix {component.prefix}" if component.prefix else ""
            lines.append(f"{component.name}: {component.layout} layout{prefix}, {component.precision}")
            lines.append(f"  {_sizes(component)}")
        if "transformer" in self.components:
            lines.append("variant: not in the file; turbo and base differ in scheduler, steps and guidance")
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}, tokenizer, scheduler")
        else:
            lines.append("not in the file: tokenizer, scheduler")
        return lines


def open_checkpoint_file(
    path: Path, base: Mapping[str, Mapping[str, Any]] | None = None, label: str = ""
) -> CheckpointFile:
    """Open a single-file checkpoint of whatever layout and precision, by its header.

    ``base`` has config.json of each component of the checkpoint that fills in what shapes do not tell; without it the
    published Z-Image's values stand. Raises UserError, one line, for a file that is damaged, another model, quantised
    in a way that is not read, or whose tensors are not exactly those of its components: they are named.
    """
    file, stored = _open(path, label)
    by_component = _by_component(path, stored)
    components = {
        name: component
        for name in COMPONENTS
        if (component := _component(file, name, by_component.get(name, {}), (base or {}).get(name)))
    }
    if not components:
        raise _nothing(path, stored)
    return CheckpointFile(file, components)


def open_component(path: Path, name: str, base: Mapping[str, Any] | None = None, label: str = "") -> Component:
    """One component of a file; ``base`` is the config that fills in what shapes do not tell. Raises UserError, as
    above, also where the file does not hold it."""
    file, stored = _open(path, label)
    component = _component(file, name, _by_component(path, stored).get(name, {}), base)
    if component is None:
        raise UserError(f"{label or path} holds no {name}")
    return component


def recognise(path: Path, label: str = "") -> list[str]:
    """The components that a file holds, by its names alone: whether they are whole is open_checkpoint_file's to say.

    Raises UserError, one line, for a file that is damaged, another model, or quantised in a way that is not read.
    """
    _, stored = _open(path, label)
    names = [component_of(name) for name in stored]
    found = {component for component, rest in names if not JUNK[component].fullmatch(rest)}
    if not found:
        raise _nothing(path, stored)
    return [name for name in COMPONENTS if name in found]


def _open(path: Path, label: str) -> tuple[StoredFile, dict[str, StoredTensor]]:
    """A file's header, and its tensors but scales and markers. Raises UserError for other models and adapters."""
    file = open_stored(path, label)
    split = _split(file)
    refuse_relatives(file, {name: info.shape for name, info in split.get("transformer", {}).items()})
    if is_adapter(file.tensors):
        raise UserError(f"{path} is a LoRA or another adapter, not a checkpoint: use loras=[{path.name}]")
    return file, stored_tensors(file)


def _nothing(path: Path, stored: Mapping[str, StoredTensor]) -> UserError:
    return UserError(f"{path} holds no part of Z-Image ({kinds_of_names(list(stored)) or 'no tensors'}): {NEED}")


def _by_component(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    by_component: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        component, rest = component_of(name)
        if rest in by_component.setdefault(component, {}):
            raise UserError(f"{path}: {rest} is there twice, as {by_component[component][rest].name} and {name}")
        by_component[component][rest] = tensor
    return by_component


def _split(file: StoredFile) -> dict[str, dict[str, Any]]:
    split: dict[str, dict[str, Any]] = {}
    for name, info in file.tensors.items():
        component, rest = component_of(name)
        split.setdefault(component, {})[rest] = info
    return split


def _component(
    file: StoredFile, name: str, stored: Mapping[str, StoredTensor], base: Mapping[str, Any] | None
) -> Component | None:
    used = {key: tensor for key, tensor in stored.items() if not JUNK[name].fullmatch(key)}
    if not used:
        return None
    tensors, layout = _published(file, name, used)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    try:
        config = config_of(name, shapes, base)
    except UnknownShapes as error:
        prefix = unknown_prefix(used)
        if prefix is not None:
            raise UserError(
                f"{file.path}: its tensors' names begin with {prefix!r}, a prefix that no layout of Z-Image has: "
                "if they are Z-Image's, save them without it"
            ) from error
        keys = kinds_of_names([tensor.name for tensor in used.values()])
        raise UserError(f"{file.path}: {error}: not Z-Image's {name}, or damaged (it holds {keys}): {NEED}") from error
    refuse_architecture(file, name)
    _check(file, name, tensors, expected_shapes(name, config))
    start = min(info.start for info in file.tensors.values())
    return Component(name, config, tensors, layout, prefix_of(next(iter(used.values())).name), start)


def _published(
    file: StoredFile, component: str, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, PublishedTensor], str]:
    """(tensors under published names, the layout's name)."""
    levels = ldm_levels(list(stored)) if component == "vae" else 0
    tensors: dict[str, PublishedTensor] = {}
    for key, tensor in stored.items():
        names = published(component, key, levels)
        if tensor.rows % len(names):
            raise UserError(
                f"{file.path}: {tensor.name} has {tensor.rows} rows: {len(names)} equal parts were expected"
            )
        rows = tensor.rows // len(names)
        for i, name in enumerate(names):
            if name in tensors:
                raise UserError(f"{file.path}: {name} is there twice, as {tensors[name].stored.name} and {tensor.name}")
            shape = _published_shape(component, name, (rows, *tensor.shape[1:]) if tensor.shape else ())
            tensors[name] = PublishedTensor(name, shape, tensor, i * rows, (i + 1) * rows)
    return tensors, _layout(component, stored)


def _published_shape(component: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in PAD_TOKENS and len(shape) == 1:
        return (1, *shape)
    if component == "vae" and ".attentions." in name and shape[2:] == (1, 1):
        return shape[:2]  # LDM's attention is made of 1x1 convolutions, diffusers' of linear layers
    return shape


def _layout(component: str, stored: Mapping[str, StoredTensor]) -> str:
    if component == "transformer":
        return "ComfyUI" if any(f".{module}." in key for key in stored for module in BLOCK_MODULES) else "diffusers"
    if component == "vae":
        return "LDM" if any(key.startswith(("decoder.up.", "decoder.mid.")) for key in stored) else "diffusers"
    return "llama.cpp" if "token_embd.weight" in stored else "transformers"


def _check(
    file: StoredFile, component: str, tensors: Mapping[str, PublishedTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in tensors]
    leftover = [tensor.stored.name for name, tensor in tensors.items() if name not in expected]
    wrong = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    refuse_names(file.path, f"{file.path}: the {component}", "Z-Image", missing, leftover)
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{file.path}: {tensors[name].stored.name} gives {name} the shape {list(tensors[name].shape)}, the other "
            f"tensors ask for {list(expected[name])}"
        )


def _precision(tensor: StoredTensor) -> str:
    name = _PRECISIONS.get(tensor.info.dtype, tensor.info.dtype)
    if tensor.encoding == "scaled":
        return name + (" convrot" if tensor.rotation else " scaled")
    if tensor.encoding == "plain" and tensor.info.dtype.startswith("F8_"):
        return name + " cast"
    return tensor.encoding if tensor.encoding in ("nvfp4", "mxfp8") else name


def _sizes(component: Component) -> str:
    config, count = component.config, len(component.tensors)
    if component.name == "transformer":
        text = "dim {dim}, {n_layers} layers, {n_refiner_layers} + {n_refiner_layers} refiner layers, {n_heads} heads, "
        text += "caption features {cap_feat_dim}"
    elif component.name == "text_encoder":
        text = "hidden {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} heads, vocabulary {vocab_size}"
    else:
        text = "channels {block_out_channels}, {latent_channels} latent channels"
    return f"{text.format(**config)}: {counted(count, 'tensor')}"
