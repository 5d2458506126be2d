"""A component's tensors a part at a time, for a device that has no room for all of them at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zimage_runner.weights.load import READER_THREADS
from zimage_runner.weights.packed.format import Packing
from zimage_runner.weights.packed.unpack import load_packed
from zimage_runner.weights.safetensors_file import TensorInfo, WeightsFile

LAYER = re.compile(r"(?:.*?\.)?\d+\.")


class PackedParts(Mapping[str, torch.Tensor]):
    """The tensors of a packed file. Asking for one loads its layer's as a whole, and forgets the layer before."""

    def __init__(self, packing: Packing, device: str) -> None:
        self._packing, self._device = packing, device
        self._parts: dict[tuple[str, str], list[str]] = {}
        for name, info in packing.unpacked.tensors.items():
            self._parts.setdefault(_part(name, info), []).append(name)
        self._loaded: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._loaded:
            names = self._parts[_part(name, self._packing.unpacked.tensors[name])]
            self._loaded.clear()
            self._loaded = load_packed([part_of(self._packing, names)], self._device, READER_THREADS)
        # Handed out once: what holds it afterwards decides how long its memory is needed.
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._packing.unpacked.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._packing.unpacked.tensors)

    def __len__(self) -> int:
        return len(self._packing.unpacked.tensors)


def _part(name: str, info: TensorInfo) -> tuple[str, str]:
    """A layer's tensors of one dtype lie together; what belongs to no layer is a part of its own."""
    layer = LAYER.match(name)
    return (layer.group() if layer else name, info.dtype)


def part_of(packing: Packing, names: Sequence[str]) -> Packing:
    """The frames that hold these tensors, as a packing of their own."""
    infos = {name: packing.unpacked.tensors[name] for name in names}
    begin = min(info.start for info in infos.values())
    end = max(info.start + info.nbytes for info in infos.values())
    frames = [frame for frame in packing.frames if frame.start < end and frame.start + 2 * frame.values > begin]
    base = frames[0].start
    size = frames[-1].start + 2 * frames[-1].values - base
    tensors = {name: replace(info, start=info.start - base) for name, info in infos.items()}
    shifted = tuple(replace(frame, start=frame.start - base) for frame in frames)
    return Packing(WeightsFile(packing.unpacked.path, size, 0, tensors), shifted, packing.frame_bytes)


def packed_parts(path: Path, device: str) -> PackedParts | None:
    """The parts of a packed file; None for one that is not packed."""
    from zimage_runner.weights.packed.format import packing_of
    from zimage_runner.weights.safetensors_file import read_header

    packing = packing_of(read_header(path))
    return None if packing is None else PackedParts(packing, device)
