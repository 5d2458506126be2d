"""Which tensors of a file are quantised, how, and which other tensors are their scales: from header and markers.

Layouts of ComfyUI, new (``<layer>.comfy_quant`` or the header's ``_quantization_metadata``, ``weight_scale``) and old
(marker ``scaled_fp8``, ``scale_weight``). What other quantisers write is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.weights.formats.decode import FLOATS, MXFP8_BLOCK, NVFP4_BLOCK, StoredTensor, tile_shape
from zimage_runner.weights.formats.files import StoredFile
from zimage_runner.weights.formats.names import component_of, prefix_of
from zimage_runner.weights.safetensors_file import TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
FORMATS = {
    "float8_e4m3fn": ("F8_E4M3",), "float8_e5m2": ("F8_E5M2",), "int8_tensorwise": ("I8",), "nvfp4": ("U8",),
    "mxfp8": ("F8_E4M3",),
}  # fmt: skip
"""ComfyUI's formats that are read, and the dtypes that weights in them are stored in."""
GROUP = 256
"""Columns that convrot rotates together where a file does not say."""
_SCALES = {
    "weight_scale": "weight_scale", "scale_weight": "weight_scale", "weight_scale_2": "weight_scale_2",
    "pre_quant_scale": "pre_quant_scale",
}  # fmt: skip
_IGNORED = ("input_scale", "scale_input")
"""Scales of activations: the products are computed in bf16, which needs none."""
_MARKER, _OLD_MARKER = ".comfy_quant", "scaled_fp8"
_MAX_MARKER = 4096
_OTHERS = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ, AWQ or AutoRound"),
    (r"\.(wscales|wcscales|wtscale|smooth_factor|smooth_factor_orig|proj_down|proj_up)$", "nunchaku (SVDQuant)"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.|\.SCB$", "bitsandbytes"),
    (r"\.(svd_up|svd_down|zero_point|scale)$", "SDNQ"),
    (r"\._(data|scale|shift)$", "quanto"),
    (r"\.(weight_s_rel|weight_s_channel|weight_codebook)$", "ComfyUI's asym_w4a8_int8"),
)
_REMEDY = "get the bf16, fp8_scaled, int8, nvfp4 or GGUF file of the model instead"


def stored_tensors(file: StoredFile) -> dict[str, StoredTensor]:
    """Every tensor of the file that is not a scale or a marker, under the file's own names.

    Raises UserError for a quantisation that is not read, naming it, and for scales that are missing or do not fit.
    """
    if file.kind == "gguf":
        return {name: _gguf(file, name, info) for name, info in file.tensors.items()}
    _refuse_others(file)
    formats = _declared_formats(file)
    companions = _companions(file)
    used = {name for owned in companions.values() for name, _ in owned.values()}
    rest = {name: info for name, info in file.tensors.items() if name not in used and not _is_marker(name)}
    for layer in formats:
        if f"{layer}.weight" not in rest:
            raise UserError(f"{file.path}: {layer} is marked as quantised, and has no weight: the file is damaged")
    return {
        name: _tensor(file, name, info, companions.get(name, {}), formats.get(name.removesuffix(".weight")))
        for name, info in rest.items()
    }


def _is_marker(name: str) -> bool:
    return name.endswith(_MARKER) or component_of(name)[1] == _OLD_MARKER


def _refuse_others(file: StoredFile) -> None:
    for pattern, quantiser in _OTHERS:
        found = next((name for name in file.tensors if re.search(pattern, name)), None)
        if found:
            raise UserError(f"{file.path} is quantised by {quantiser} ({found}), which is not supported: {_REMEDY}")


def _companions(file: StoredFile) -> dict[str, dict[str, tuple[str, TensorInfo]]]:
    """Of each weight: role -> (name, tensor) of what belongs to it, scales of activations included."""
    found: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for name, info in file.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if (leaf in _SCALES or leaf in _IGNORED) and f"{layer}.weight" in file.tensors:
            owned = found.setdefault(f"{layer}.weight", {})
            role = _SCALES.get(leaf, leaf)
            if role in owned:
                raise UserError(f"{file.path}: {layer} has both {owned[role][0]} and {name}: the file is damaged")
            owned[role] = (name, info)
    return found


def _declared_formats(file: StoredFile) -> dict[str, dict[str, Any]]:
    """Layer -> what its marker, or the header, says of its format."""
    formats: dict[str, dict[str, Any]] = {}
    prefixes = {prefix_of(name) for name in file.tensors}
    for layer, entry in _header_formats(file).items():
        known = next((p + layer for p in ("", *sorted(prefixes)) if f"{p}{layer}.weight" in file.tensors), layer)
        formats[known] = entry
    for name, info in file.tensors.items():
        if name.endswith(_MARKER):
            formats[name.removesuffix(_MARKER)] = _marker(file, name, info)
    return formats


def _header_formats(file: StoredFile) -> dict[str, dict[str, Any]]:
    text = file.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(str(text))["layers"]
        return {str(layer): dict(entry) for layer, entry in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file.path}: its header's _quantization_metadata cannot be read: {error}") from error


def _marker(file: StoredFile, name: str, info: TensorInfo) -> dict[str, Any]:
    if info.nbytes > _MAX_MARKER:
        raise UserError(f"{file.path}: {name} has {info.nbytes} bytes, which is absurd: the file is damaged")
    with file.path.open("rb") as handle:
        handle.seek(info.start)
        data = handle.read(info.nbytes)
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file.path}: {name} cannot be read as JSON ({error}): the file is damaged") from error


def _tensor(
    file: StoredFile,
    name: str,
    info: TensorInfo,
    companions: Mapping[str, tuple[str, TensorInfo]],
    declared: dict[str, Any] | None,
) -> StoredTensor:
    scales = {role: found for role, (_, found) in companions.items() if role not in _IGNORED}
    kind = _format_of(file, name, info, scales, declared)
    if kind is None:
        if scales and "weight_scale" not in scales:
            raise UserError(f"{file.path}: {name} has {', '.join(scales)} and no weight_scale: the file is damaged")
        if not scales:
            return StoredTensor(file.path, name, info, info.shape)
        kind = "float8_e4m3fn"  # a scaled float of any width: some files give unquantised layers a scale of 1
    if "weight_scale" not in scales:
        raise UserError(f"{file.path}: {name} is {kind} and its weight_scale is missing: the file is damaged")
    if kind == "nvfp4":
        return _blocked(file, name, info, scales, "nvfp4", (*info.shape[:-1], 2 * info.shape[-1]), NVFP4_BLOCK)
    if kind == "mxfp8":
        return _blocked(file, name, info, scales, "mxfp8", info.shape, MXFP8_BLOCK)
    return _scaled(file, name, info, scales, declared or {})


def _format_of(
    file: StoredFile, name: str, info: TensorInfo, scales: Mapping[str, TensorInfo], declared: dict[str, Any] | None
) -> str | None:
    """ComfyUI's name of a weight's format; None for plain numbers, fp8 casts among them."""
    if declared is not None:
        kind = str(declared.get("format"))
        if kind not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{file.path}: {name} has the format {kind!r}, which is not supported: {_REMEDY} ({known})")
        if info.dtype not in FORMATS[kind]:
            raise UserError(f"{file.path}: {name} is marked {kind} and stored as {info.dtype}: the file is damaged")
        return kind
    if info.dtype == "U8":
        if {"weight_scale", "weight_scale_2"} <= scales.keys():
            return "nvfp4"
        raise UserError(f"{file.path}: {name} is packed (U8) in a way that is not known: {_REMEDY}")
    if info.dtype == "I8":
        return "int8_tensorwise"
    if info.dtype in FP8 and "weight_scale" in scales:
        return "mxfp8" if scales["weight_scale"].dtype in ("F8_E8M0", "U8") else "float8_e4m3fn"
    if info.dtype not in (*FLOATS, *FP8, "F64"):
        raise UserError(f"{file.path}: {name} is {info.dtype}, which is no weight of a known format: {_REMEDY}")
    return None


def _scaled(
    file: StoredFile, name: str, info: TensorInfo, scales: Mapping[str, TensorInfo], declared: Mapping[str, Any]
) -> StoredTensor:
    scale = scales["weight_scale"]
    rows = info.shape[0] if info.shape else 1
    if math.prod(scale.shape) not in (1, rows) or scale.dtype not in FLOATS:
        raise UserError(
            f"{file.path}: weight_scale of {name} is {scale.dtype} {list(scale.shape)}: need one float for the tensor "
            f"or one for each of its {rows} rows"
        )
    if set(scales) - {"weight_scale"}:
        raise UserError(f"{file.path}: {name} has {', '.join(scales)}, which do not belong together")
    rotation = declared.get("convrot_groupsize", GROUP) if declared.get("convrot") else 0
    if rotation and not (isinstance(rotation, int) and _is_power_of_4(rotation) and info.shape[-1] % rotation == 0):
        raise UserError(
            f"{file.path}: {name}: convrot_groupsize={rotation!r} must be a power of 4 that divides its "
            f"{info.shape[-1]} columns"
        )
    return StoredTensor(file.path, name, info, info.shape, "scaled", dict(scales), rotation)


def _is_power_of_4(number: int) -> bool:
    return 4 <= number <= 65536 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


def _blocked(
    file: StoredFile,
    name: str,
    info: TensorInfo,
    scales: Mapping[str, TensorInfo],
    encoding: str,
    shape: tuple[int, ...],
    block: int,
) -> StoredTensor:
    scale = scales["weight_scale"]
    expected = math.prod(tile_shape(shape[0], shape[1] // block)) if len(shape) == 2 else -1
    dtypes = ("F8_E4M3",) if encoding == "nvfp4" else ("F8_E8M0", "U8")
    extra = scales.keys() - {"weight_scale", "weight_scale_2", "pre_quant_scale"}
    if len(shape) != 2 or shape[1] % block or math.prod(scale.shape) != expected or scale.dtype not in dtypes or extra:
        raise UserError(
            f"{file.path}: {name} is {encoding} {list(shape)} and its weight_scale {scale.dtype} {list(scale.shape)}: "
            f"need {' or '.join(dtypes)} for every {block} columns, in tiles of 128 x 4"
        )
    tensor_scale, columns = scales.get("weight_scale_2"), scales.get("pre_quant_scale")
    if encoding == "nvfp4" and (tensor_scale is None or math.prod(tensor_scale.shape) != 1):
        raise UserError(f"{file.path}: {name} is nvfp4 and its weight_scale_2 is missing or no single number")
    if columns is not None and (encoding != "nvfp4" or math.prod(columns.shape) != shape[1]):
        raise UserError(f"{file.path}: pre_quant_scale of {name} does not have one number for each of its columns")
    return StoredTensor(file.path, name, info, shape, encoding, dict(scales))


def _gguf(file: StoredFile, name: str, info: TensorInfo) -> StoredTensor:
    """A GGUF tensor, in the shape it had before a converter rearranged it to fit whole blocks."""
    shape = info.shape
    original = file.metadata.get(f"comfy.gguf.orig_shape.{name}")
    if original is not None:
        numbers = original if isinstance(original, list) else []
        if not all(type(n) is int and n >= 0 for n in numbers) or math.prod(numbers) != math.prod(shape):
            raise UserError(f"{file.path}: comfy.gguf.orig_shape.{name} {original!r} does not fit {list(shape)}")
        shape = tuple(numbers)
    if info.dtype in FLOATS:
        return StoredTensor(file.path, name, TensorInfo(info.dtype, shape, info.start, info.nbytes), shape)
    if not shape:
        raise UserError(f"{file.path}: {name} is {info.dtype} and has no dimensions: the file is damaged")
    return StoredTensor(file.path, name, info, shape, "gguf")
