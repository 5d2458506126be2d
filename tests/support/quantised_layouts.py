"""Quantised files of known weights: each encoder says which numbers the stored bytes stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.support import weight_formats as support

if TYPE_CHECKING:
    import gguf
    from gguf import GGMLQuantizationType

Weights = support.Weights
Encoded = tuple[Weights, torch.Tensor]
"""(a layer's tensors by leaf name, the numbers that they stand for)."""
Encode = Callable[[torch.Tensor], Encoded]


def scaled(key: str, rows: bool, marks: dict | None, extra: str = "") -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        values, scale = support.fp8(weight, rows)
        tensors = {"weight": values, key: scale}
        if marks is not None:
            tensors["comfy_quant"] = support.marker(**marks)
        if extra:
            tensors[extra] = torch.tensor(1.0)
        return tensors, values.float() * scale

    return encode


def fp8_e5m2(weight: torch.Tensor) -> Encoded:
    scale = weight.float().abs().max().reshape(1) / 57344
    values = (weight.float() / scale).to(torch.float8_e5m2)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def cast(weight: torch.Tensor) -> Encoded:
    values = weight.to(torch.float8_e4m3fn)
    return {"weight": values}, values.float()


def int8(rows: bool, flat: bool = False) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        values, scale = support.int8(weight, rows)
        stored = scale.flatten() if flat else scale
        marks = support.marker(format="int8_tensorwise", per_row=rows)
        return {"weight": values, "weight_scale": stored, "comfy_quant": marks}, values.float() * scale

    return encode


def convrot(group: int | None = None) -> Encode:
    """``group``: columns that are rotated together; None: as many as is usual, and the file does not say it."""

    def encode(weight: torch.Tensor) -> Encoded:
        size = group or 256
        values, scale = support.int8(support.rotated(weight, size), rows=True)
        said = {} if group is None else {"convrot_groupsize": group}
        marks = support.marker(format="int8_tensorwise", convrot=True, **said)
        tensors = {"weight": values, "weight_scale": scale, "comfy_quant": marks}
        return tensors, support.rotated(values.float() * scale, size)

    return encode


def encoded(
    weights: Weights, encode: Encode, is_quantised: Callable[[str, torch.Tensor], bool], prefix: str = ""
) -> tuple[Weights, Weights]:
    """(a ComfyUI file's tensors, the published weights that they stand for); ``is_quantised`` says which of the file's
    tensors are encoded."""
    file: Weights = {}
    meant = dict(weights)
    for name, tensor in support.comfyui(weights).items():
        if not is_quantised(name, tensor):
            file[prefix + name] = tensor
            continue
        layer = name.removesuffix(".weight")
        tensors, values = encode(tensor)
        file |= {f"{prefix}{layer}.{leaf}": value for leaf, value in tensors.items()}
        if ".qkv." in name:
            parts = [name.replace(".qkv.", f".to_{part}.") for part in "qkv"]
            meant |= dict(zip(parts, values.chunk(3), strict=True))
        else:
            meant[name.replace(".out.", ".to_out.0.")] = values
    return file, meant


def write_gguf(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    kind: GGMLQuantizationType,
    is_quantised: Callable[[str, torch.Tensor], bool],
    architecture: str = "lumina2",
) -> Path:
    """As city96's converter: matrices of blocks in ``kind`` (here one), other large tensors BF16, small ones F32."""
    import gguf
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in weights.items():
        small = Kind.F32 if tensor.ndim == 1 or tensor.numel() <= 1024 else Kind.BF16
        chosen = kind if is_quantised(name, tensor) else small
        writer.add_tensor(name, quants.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
