"""From a tensor's stored bytes to numbers: plain floats, scaled fp8 and int8, nvfp4, mxfp8, and GGUF's blocks.

Each formula's source is named where it stands; CK is comfy-kitchen, whose layouts ComfyUI writes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError
from zimage_runner.weights.io import read_exactly
from zimage_runner.weights.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")
"""Stored dtypes whose bytes can be read as they are."""
CHUNK = 2**24
"""Elements decoded at a time: 64 MiB of float32."""
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
"""Consecutive columns that share a scale."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits of a 4-bit float (1 sign, 2 exponent, 1 mantissa bit: OCP Microscaling Formats, E2M1)."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, in whatever encoding; rows of it can be read as numbers."""

    path: Path
    name: str
    """As the file names it."""
    info: TensorInfo
    shape: tuple[int, ...]
    """Of what it decodes to."""
    encoding: str = "plain"
    """plain, scaled (fp8, int8), nvfp4, mxfp8 or gguf."""
    scales: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The tensors that belong to it: weight_scale, weight_scale_2, pre_quant_scale."""
    rotation: int = 0
    """int8 convrot: columns of a group that a Hadamard matrix has rotated; 0: none."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def is_fp8(self) -> bool:
        """Whether it is e4m3 with a scale of the tensor, of each row or none: what fp8 products take as it is."""
        return self.info.dtype == "F8_E4M3" and self.encoding in ("plain", "scaled") and not self.rotation

    @property
    def is_plain_float(self) -> bool:
        """Whether its bytes are the numbers, so that a stretch of the file is a stretch of rows."""
        return self.encoding == "plain" and self.info.dtype in FLOATS

    def read(self, first: int = 0, last: int | None = None, device: str = "cpu") -> torch.Tensor:
        """Rows ``first`` to ``last``, decoded: float32, or the stored dtype where it is a plain float.

        Decoded on the device (GGUF's blocks: on the CPU, then moved), so that it is fast and few bytes travel.
        Raises UserError for scales that are no numbers, and OSError.
        """
        last = self.rows if last is None else last
        if self.encoding == "gguf":
            return _gguf_rows(self, first, last).to(device)
        raw = _raw_rows(self.path, self.info, first, last).to(device)
        if self.encoding == "plain":
            return raw if self.info.dtype in FLOATS else raw.float()
        return _DECODERS[self.encoding](self, raw, first, last)

    def scale(self, name: str, device: torch.device) -> torch.Tensor:
        """One of its scales, as stored. Raises UserError where it is not finite."""
        import torch

        info = self.scales[name]
        values = _raw_rows(self.path, info, 0, info.shape[0] if info.shape else 1).reshape(info.shape)
        if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
            raise UserError(f"{self.path}: {name} of {self.name} is not finite: the file is damaged")
        return values.to(device)


@dataclass(frozen=True, slots=True)
class PublishedTensor:
    """A tensor under its published name: rows of a stored one, perhaps in another shape."""

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor
    first: int
    last: int

    @property
    def info(self) -> TensorInfo | None:
        """Where its bytes lie, where they are the numbers; None for what must be decoded."""
        if not self.stored.is_plain_float:
            return None
        row = self.stored.info.nbytes // max(self.stored.rows, 1)
        start, nbytes = self.stored.info.start + self.first * row, (self.last - self.first) * row
        return TensorInfo(self.stored.info.dtype, self.shape, start, nbytes)

    def read(self, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """Its numbers in ``dtype``; None: as stored for plain floats, else float32."""
        import torch

        parts = self.pieces(device)
        head = next(parts)
        dtype = dtype or head.dtype
        if head.numel() == math.prod(self.shape):
            return head.to(dtype).reshape(self.shape)
        whole = torch.empty(math.prod(self.shape), dtype=dtype, device=device)
        done = 0
        while True:
            whole[done : done + head.numel()] = head.flatten()
            done += head.numel()
            head = next(parts, None)
            if head is None:
                return whole.reshape(self.shape)

    def pieces(self, device: str = "cpu") -> Iterator[torch.Tensor]:
        """Its rows in turn, some 16 million numbers at a time; together they are its numbers in order."""
        width = math.prod(self.stored.shape[1:])
        step = max(1, CHUNK // max(width, 1))
        if self.first >= self.last:
            yield self.stored.read(self.first, self.last, device)
        for first in range(self.first, self.last, step):
            yield self.stored.read(first, min(first + step, self.last), device)

    def elements(self, first: int, count: int) -> torch.Tensor:
        """``count`` consecutive numbers from the ``first`` on, flat; float32 or as stored. Whole rows are decoded."""
        width = max(math.prod(self.stored.shape[1:]), 1)
        begin, lead = divmod(first, width)
        last = self.first + -(-(first + count) // width)
        return self.stored.read(self.first + begin, last).flatten()[lead : lead + count]

    def raw_bytes(self, first: int, count: int) -> torch.Tensor:
        """``count`` stored numbers of eight bits from the ``first`` on, uint8."""
        width = max(math.prod(self.stored.shape[1:]), 1)
        info = self.stored.info
        whole, begin = TensorInfo("U8", (info.nbytes,), info.start, info.nbytes), self.first * width + first
        return _raw_rows(self.stored.path, whole, begin, begin + count)

    def row_scales(self) -> torch.Tensor:
        """[rows] float32 that multiply the stored numbers of each row."""
        import torch

        rows = self.last - self.first
        if self.stored.encoding == "plain":
            return torch.ones(rows)
        scale = self.stored.scale("weight_scale", torch.device("cpu")).float().flatten()
        return scale.expand(rows).clone() if scale.numel() == 1 else scale[self.first : self.last].clone()


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """A whole tensor of a safetensors file, in its own dtype."""
    return _raw_rows(path, info, 0, info.shape[0] if info.shape else 1).reshape(info.shape)


def hadamard(size: int) -> torch.Tensor:
    """The symmetric orthogonal matrix [size, size] of convrot, its own inverse; ``size`` is a power of 4.

    Kronecker powers of a 4 x 4 Hadamard matrix with its negative signs off the diagonal (CK tensor/int8_utils.py).
    """
    import torch

    seed = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix / math.sqrt(size)


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of scales as cuBLAS's tiles of 128 x 4 pad them."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def untile(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] of block scales in cuBLAS's order.

    Tiles of 128 rows x 4 columns follow one another, row of tiles by row of tiles; in a tile row r, column c lies at
    (r % 32) * 16 + (r // 32) * 4 + c (cuBLAS documentation, "1D block scaling factors layout").
    """
    padded_rows, padded_columns = tile_shape(rows, columns)
    tiles = scales.reshape(padded_rows // 128, padded_columns // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)[:rows, :columns]


def _raw_rows(path: Path, info: TensorInfo, first: int, last: int) -> torch.Tensor:
    import torch

    rows = info.shape[0] if info.shape else 1
    row = info.nbytes // rows if rows else 0
    data = torch.empty((last - first) * row, dtype=torch.uint8)
    if len(data):
        with path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), info.start + first * row, data.numpy().data, path)
    return data.view(getattr(torch, TORCH_DTYPES[info.dtype])).reshape(last - first, *info.shape[1:])


def _scaled(tensor: StoredTensor, raw: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Number times its tensor's or its row's scale, then out of the rotation."""
    import torch

    scale = tensor.scale("weight_scale", raw.device).float().flatten()
    rows = scale[first:last].reshape(-1, *[1] * (raw.ndim - 1)) if scale.numel() > 1 else scale
    values = raw.float() * rows
    if tensor.rotation:
        groups = values.unflatten(1, (-1, tensor.rotation))
        values = torch.matmul(groups, _hadamard(tensor.rotation).to(raw.device)).flatten(1)
    return values


@functools.lru_cache(maxsize=4)
def _hadamard(size: int) -> torch.Tensor:
    return hadamard(size)


def _nvfp4(tensor: StoredTensor, raw: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Two 4-bit floats a byte, the even column in the high half, times block scale and tensor scale (CK)."""
    import torch

    table = torch.tensor(FP4_VALUES + tuple(-value for value in FP4_VALUES), device=raw.device)
    codes = torch.stack([raw >> 4, raw & 15], dim=-1).flatten(1)
    columns = codes.shape[1]
    block = untile(tensor.scale("weight_scale", raw.device), tensor.rows, columns // NVFP4_BLOCK)[first:last]
    block = block.float() * tensor.scale("weight_scale_2", raw.device).float().flatten()
    values = (table[codes.long()].unflatten(1, (-1, NVFP4_BLOCK)) * block[..., None]).flatten(1)
    if "pre_quant_scale" in tensor.scales:
        # The activations are multiplied by it before the product, which is the same as the weight's columns.
        values = values * tensor.scale("pre_quant_scale", raw.device).float().flatten()
    return values


def _mxfp8(tensor: StoredTensor, raw: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """fp8 times 2^(e - 127) of each 32 columns (OCP Microscaling Formats)."""
    import torch

    exponents = tensor.scale("weight_scale", raw.device).view(torch.float8_e8m0fnu)
    block = untile(exponents.float(), tensor.rows, raw.shape[1] // MXFP8_BLOCK)[first:last]
    return (raw.float().unflatten(1, (-1, MXFP8_BLOCK)) * block[..., None]).flatten(1)


def _gguf_rows(tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
    import torch

    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(
            f"{tensor.path}: reading {tensor.info.dtype} needs the gguf package: pip install 'zimage-runner[gguf]'"
        ) from error
    stored = tensor.info.shape
    is_reshaped = stored != tensor.shape  # blocks then lie across rows
    begin, end = (0, stored[0]) if is_reshaped else (first, last)
    row = tensor.info.nbytes // stored[0]
    info = TensorInfo("U8", (stored[0], row), tensor.info.start, tensor.info.nbytes)
    blocks = _raw_rows(tensor.path, info, begin, end).numpy()
    values = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.info.dtype]))
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{tensor.path}: {tensor.name} holds NaN or infinity: the file is damaged")
    return values.reshape(tensor.shape)[first:last] if is_reshaped else values.reshape(last - first, *stored[1:])


_DECODERS = {"scaled": _scaled, "nvfp4": _nvfp4, "mxfp8": _mxfp8}
