"""Where the published tensors lie in the native modules, for adapters to be merged into them.

The modules stack matrices that are multiplied together; an adapter's change of one of them is a change of some rows.
Weights in eight bits are merged before they are rounded: from the published tensors, which are read for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from zimage_runner.engines.merging import Component, Slot
from zimage_runner.engines.native.layers import PackedLinear
from zimage_runner.engines.native.loading import (
    TEXT_ENCODER_RULES,
    TEXT_ENCODER_UNUSED,
    TRANSFORMER_RULES,
    Rules,
    open_parts,
    owner_of,
    published_names,
)
from zimage_runner.engines.native.model import NativeModel
from zimage_runner.engines.native.quantised import SCALE, QuantisedLinear
from zimage_runner.engines.native.text_encoder import Qwen3Attention, TextEncoder
from zimage_runner.errors import UserError
from zimage_runner.weights.eight_bits import quantise_rows

Read = Callable[[str], torch.Tensor]
"""Gives a published tensor."""


class NativeSlot(Slot):
    """Rows of a native module's parameter."""

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        super().fill(values)
        if isinstance(self.owner, PackedLinear):
            self.owner._packed = None  # the CPU's second form of the weight is made anew


class QuantisedSlot(Slot):
    """Rows of a weight in eight bits, with their scales."""

    def __init__(self, owner: QuantisedLinear, begin: int, rows: int, read: Callable[[], torch.Tensor]) -> None:
        """``read`` gives the published weight that the rows were rounded from."""
        super().__init__(owner, "weight", begin, rows)
        self._linear, self._read = owner, read

    def stored(self) -> tuple[torch.Tensor, ...]:
        return self.view("weight"), self.view(SCALE)

    def to_keep(self) -> tuple[torch.Tensor, ...]:
        return (*self.stored(), self._read())

    def original(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return kept[2]

    def put_back(self, kept: Sequence[torch.Tensor]) -> None:
        self.fill(kept[:2])

    def write(self, value: torch.Tensor) -> None:
        self.fill(quantise_rows(value.to(self._linear.dtype), self._linear.form))


class Published:
    """A checkpoint's own tensors, by their published names."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._tensors: Mapping[str, torch.Tensor] | None = None

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor on the device, rounded to the compute dtype. Raises UserError if it is not there."""
        try:
            if self._tensors is None:
                self._tensors = open_parts(self._folder, str(self._device))
            return self._tensors[name].to(self._device).to(self._dtype)
        except (KeyError, OSError) as error:
            raise UserError(
                f"adapters are merged into weights before these are rounded to eight bits, and {self._folder} has no "
                f"{name}: use engine.precision=bf16"
            ) from error


def adapted_transformer(model: NativeModel, folder: Path) -> Component:
    """The model's loaded transformer, whose published tensors are in ``folder``."""
    transformer = model.transformer
    published = Published(folder, model.device, model.options.dtype)

    def pause() -> None:
        for stream in (transformer.stream, transformer.caption_stream):
            if stream is not None:
                stream.pause()

    slots = _slots(transformer, TRANSFORMER_RULES, published)
    return Component("transformer", slots, model.device, about_to_change=pause, changed=model.weights_changed)


def adapted_text_encoder(model: NativeModel) -> Component:
    """The model's loaded text encoder."""
    encoder = model.text_encoder
    assert isinstance(encoder, TextEncoder)
    unused = re.compile(TEXT_ENCODER_UNUSED.format(last=encoder.config.num_hidden_layers - 1))
    slots = _slots(encoder, TEXT_ENCODER_RULES, None)
    return Component("text_encoder", slots, model.device, unused=lambda name: unused.fullmatch(name) is not None)


def _slots(module: nn.Module, rules: Rules, read: Read | None) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for name, parameter in module.named_parameters():
        owner, leaf = owner_of(module, name)
        if leaf == SCALE:
            continue
        parts, begin = published_names(name, rules), 0
        for part, rows in zip(parts, _rows(module, name, len(parameter), len(parts)), strict=True):
            if isinstance(owner, QuantisedLinear):
                assert read is not None
                slots[part] = QuantisedSlot(owner, begin, rows, _reading(read, part))
            else:
                slots[part] = NativeSlot(owner, leaf, begin, rows)
            begin += rows
    return slots


def _reading(read: Read, name: str) -> Callable[[], torch.Tensor]:
    return lambda: read(name)


def _rows(module: nn.Module, name: str, total: int, parts: int) -> list[int]:
    """Rows of each published tensor that is stacked in a parameter: equal ones, but for fewer keys than queries."""
    owner = module.get_submodule(name.removesuffix(".qkv_proj.weight")) if name.endswith(".qkv_proj.weight") else None
    if isinstance(owner, Qwen3Attention):
        return [heads * owner.head_dim for heads in (owner.heads, owner.kv_heads, owner.kv_heads)]
    return [total // parts] * parts
