"""Reading a GGUF header, bounded, without numpy or the ``gguf`` package (which decodes the blocks, decode.py).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from zimage_runner.weights.safetensors_file import BadWeightsFile, TensorInfo

BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}  # fmt: skip
"""ggml's number of a type: its name, elements a block, bytes a block. Other types are refused by number."""
MAX_TENSORS = 100_000
MAX_FIELDS = 100_000
MAX_DIMENSIONS = 4
MAX_LIST = 16
"""Numbers of a list in the metadata that are kept: shapes are; tokenizers are skipped."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_gguf_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, object]]:
    """(tensors, metadata). Shapes have the rows first; long lists and lists of texts are left out of the metadata.

    Raises BadWeightsFile for a truncated or garbled file, or a type of tensor that is not supported.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Header(data).read()
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise BadWeightsFile(f"not a whole GGUF file (its header cannot be read: {error})") from error


class _Header:
    """One pass over the header's bytes. Every count is compared with the bytes that are there before it is used."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4

    def read(self) -> tuple[dict[str, TensorInfo], dict[str, object]]:
        version = self._number("<I")
        if version not in (2, 3):
            raise BadWeightsFile(f"has GGUF version {version}: only 2 and 3 are supported")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise ValueError(f"{tensors} tensors and {fields} fields are absurd")
        metadata: dict[str, object] = {}
        for _ in range(fields):
            name = self._text()
            value = self._value(self._number("<I"))
            if value is not None:
                metadata[name] = value
        entries = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"alignment {alignment!r} is absurd")
        return self._placed(entries, -(-self.place // alignment) * alignment), metadata

    def _placed(self, entries: list[tuple[str, str, tuple[int, ...], int, int]], start: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        end = start
        for name, kind, shape, offset, nbytes in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                raise ValueError(f"tensor {name!r} is there twice")
            if start + offset < end:
                raise ValueError(f"tensor {name!r} overlaps its neighbour")
            end = start + offset + nbytes
            if end > len(self.data):
                raise BadWeightsFile(f"truncated: its header promises {end} bytes, the file has {len(self.data)}")
            tensors[name] = TensorInfo(kind, shape, start + offset, nbytes)
        return {name: tensors[name] for name, *_ in entries}

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name, count = self._text(), self._number("<I")
        if count > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {count} dimensions")
        shape = tuple(self._number("<Q") for _ in range(count))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in BLOCKS:
            raise BadWeightsFile(
                f"holds tensors of ggml type {number} ({name}), which is not supported: use one of "
                f"{', '.join(kind for kind, *_ in BLOCKS.values())}"
            )
        kind, elements, nbytes = BLOCKS[number]
        if shape and shape[-1] % elements:
            raise ValueError(f"{kind} tensor {name!r} of shape {list(shape)} is not made of whole blocks")
        return name, kind, shape, offset, math.prod(shape) // elements * nbytes

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self.data, self.place)
        self.place += struct.calcsize(code)
        return value

    def _text(self) -> str:
        length = self._number("<Q")
        self._need(length)
        text = self.data[self.place : self.place + length]
        self.place += length
        return text.decode()

    def _need(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.place:
            raise BadWeightsFile(f"truncated: its header alone needs more than the {len(self.data)} bytes it has")

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a field of type {kind}")
        item, count = self._number("<I"), self._number("<Q")
        if item == _STRING:
            self._need(8 * count)
            for _ in range(count):
                length = self._number("<Q")
                self._need(length)
                self.place += length
            return None
        if item not in _SCALARS:
            raise ValueError(f"a list of type {item}")
        size = struct.calcsize(_SCALARS[item])
        self._need(size * count)
        values = None if count > MAX_LIST else [self._number(_SCALARS[item]) for _ in range(count)]
        self.place += size * count if values is None else 0
        return values
