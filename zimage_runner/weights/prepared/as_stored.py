"""A transformer file's fp8 weights as products in fp8 take them: the stored numbers, under the prepared names.

What the prepared copy in fp8 holds of such a file is the same, so that a picture does not depend on the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from zimage_runner.weights.formats.checkpoint_file import Component, ComponentTensors
from zimage_runner.weights.formats.decode import PublishedTensor
from zimage_runner.weights.prepared.names import QUANTISED, prepared_tensors
from zimage_runner.weights.prepared.pieces import SCALE

if TYPE_CHECKING:
    import torch


class StoredFp8(Mapping[str, "torch.Tensor"]):
    """The tensors of a transformer in a file: those that are multiplied in fp8 and stored so with their scales; the
    others as ComponentTensors has them."""

    def __init__(self, component: Component, device: str) -> None:
        self._others = ComponentTensors(component, device)
        self._device = device
        self._taken: dict[str, list[PublishedTensor]] = {}
        parts: set[str] = set()
        for tensor in prepared_tensors("transformer", component.tensors):
            sources = [component.tensors[name] for name in tensor.sources]
            is_multiplied = QUANTISED.fullmatch(tensor.name) is not None
            if is_multiplied and all(source.stored.is_fp8 for source in sources):
                self._taken[tensor.name] = sources
                parts.update(tensor.sources)
        self._names = [name for name in component.tensors if name not in parts]
        self._names += [name + end for name in self._taken for end in ("", SCALE)]

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if name in self._taken:
            parts = [part.raw_bytes(0, part.shape[0] * part.shape[1]) for part in self._taken[name]]
            rows = sum(part.shape[0] for part in self._taken[name])
            return torch.cat(parts).view(torch.float8_e4m3fn).reshape(rows, -1).to(self._device)
        if (weight := name.removesuffix(SCALE)) != name and weight in self._taken:
            return torch.cat([part.row_scales() for part in self._taken[weight]]).to(self._device)
        return self._others[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
