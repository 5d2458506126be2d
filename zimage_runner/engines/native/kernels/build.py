"""Compile the kernels for the published models' widths: ``python -m zimage_runner.engines.native.kernels.build``.

Needs Triton, but no GPU. Run it after every change of the definitions or of the block sizes in fused_ops.py; a test
compares both with what the files were made of.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from zimage_runner.engines.native.kernels import fused_ops, prebuilt
from zimage_runner.engines.native.kernels.launch import definition
from zimage_runner.engines.native.quantised import FP8, INT8, Format, Scaled
from zimage_runner.engines.native.transformer import ADALN_WIDTH
from zimage_runner.weights.preload import machine_code
from zimage_runner.weights.preload.machine_code import ARCHITECTURES

WIDTHS = ("dim", "hidden", "channels", "features")
"""Integer arguments that the published models have in multiples of 16."""
SOURCES = [Path(__file__).parent / name for name in ("definitions.py", "quantised_definitions.py")]
FP8_ARCHITECTURE = 89
"""The first that computes in eight-bit floating point."""


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel launch, as it would happen."""

    name: str
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int

    @property
    def key(self) -> str:
        key = prebuilt.specialization(self.name, self.args, self.constants, self.warps)
        assert key is not None
        return key


@dataclass(frozen=True, slots=True)
class Widths:
    """What the kernels of a model depend on."""

    dim: int
    heads: int
    head_dim: int
    hidden: int
    caption: int
    channels: tuple[int, ...]
    groups: int


Z_IMAGE = Widths(dim=3840, heads=30, head_dim=128, hidden=10240, caption=2560, channels=(128, 256, 512), groups=32)
Z_IMAGE_NANO = Widths(dim=288, heads=6, head_dim=48, hidden=768, caption=192, channels=(32, 64, 96), groups=16)


class Recorder:
    """Stands in for ``launch.kernel``: remembers launches instead of making them."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}

    def __call__(self, name: str) -> Any:
        recorder = self

        class Recording:
            def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
                return recorder.record

        self._name = name
        return Recording()

    def record(self, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        call = Call(self._name, args, constants, num_warps)
        self.calls[call.key] = call


def calls() -> dict[str, Call]:
    """Every specialization that the published models launch, by its key."""
    recorder = Recorder()
    with mock.patch.object(fused_ops, "kernel", recorder):
        for widths, dtype in product((Z_IMAGE, Z_IMAGE_NANO), (torch.bfloat16, torch.float32)):
            _draw_with(widths, dtype)
        for widths, form in product((Z_IMAGE, Z_IMAGE_NANO), (FP8, INT8)):
            _draw_in_eight_bits(widths, form)
    return recorder.calls


def calls_for(architecture: int) -> dict[str, Call]:
    """Those of them that an architecture can run."""
    has_fp8 = architecture >= FP8_ARCHITECTURE
    return {key: call for key, call in calls().items() if has_fp8 or prebuilt.KINDS[FP8.dtype] not in key}


def _draw_with(widths: Widths, dtype: torch.dtype) -> None:
    """Call every operation as the model of these widths does, on tensors without memory."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, vector = 64, tensor(widths.dim, dtype=torch.float32)
    x = tensor(1, tokens, widths.dim)
    fused_ops.scaled_rms_norm(x, vector, 1e-5)
    fused_ops.scaled_rms_norm(tensor(1, tokens, widths.caption), tensor(widths.caption, dtype=torch.float32), 1e-5)
    for next_scale in (vector, None):
        fused_ops.add_gated_norm(x, x, vector, next_scale, 1e-5)
    angles = tensor(tokens, widths.head_dim // 2, dtype=torch.float32)
    heads = tensor(1, tokens, 3 * widths.heads * widths.head_dim)
    fused_ops.qk_norm_rope(heads, tensor(2, widths.head_dim, dtype=torch.float32), angles, angles, 1e-5)
    fused_ops.swiglu(tensor(1, tokens, 2 * widths.hidden))
    row = tensor(1, ADALN_WIDTH, dtype=torch.float32)
    fused_ops.linear_float32(row, tensor(widths.dim, ADALN_WIDTH), tensor(widths.dim))
    for channels in widths.channels:
        _decode_with(tensor, channels, widths.groups)


def _draw_in_eight_bits(widths: Widths, form: Format) -> None:
    """The same for a transformer that multiplies in this format."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def product(outputs: int) -> Scaled:
        raw = tensor(1, tokens, outputs, dtype=torch.bfloat16 if form is FP8 else torch.int32)
        vectors = [tensor(size, dtype=torch.float32) for size in (tokens, outputs)]
        return Scaled(raw, vectors[0], vectors[1], torch.bfloat16)

    tokens, vector = 64, tensor(widths.dim, dtype=torch.float32)
    x, w1w3 = tensor(1, tokens, widths.dim), product(2 * widths.hidden)
    fused_ops.scaled_rms_norm(x, vector, 1e-5, form)
    fused_ops.product_input(x, form)
    for into in (form, None):  # None: a block that multiplies in bfloat16 follows
        fused_ops.add_gated_norm(x, product(widths.dim), vector, vector, 1e-5, into)
    fused_ops.add_gated_norm(x, product(widths.dim), vector, None, 1e-5)
    fused_ops.add_gated_norm(x, x, vector, vector, 1e-5, form)
    fused_ops.swiglu(w1w3.raw if form is FP8 else w1w3, form)
    angles = tensor(tokens, widths.head_dim // 2, dtype=torch.float32)
    weight = tensor(2, widths.head_dim, dtype=torch.float32)
    width = 3 * widths.heads * widths.head_dim
    if form is FP8:
        scales = tensor(3, widths.heads, dtype=torch.float32)
        fused_ops.qk_norm_rope_quantised(tensor(1, tokens, width), weight, angles, angles, 1e-5, scales)
    else:
        fused_ops.qk_norm_rope(product(width), weight, angles, angles, 1e-5)


def _decode_with(tensor: Callable[..., torch.Tensor], channels: int, groups: int) -> None:
    picture, vector = tensor(1, channels, 8, 8), tensor(channels)
    for silu, before in product((True, False), (vector, None)):
        fused_ops.group_norm_silu(picture, groups, vector, vector, 1e-6, silu, before)
    for bias in (vector, tensor(channels, dtype=torch.float32)):  # the latter where two biases are added up
        fused_ops.add_bias_residual(picture, bias, picture)
    fused_ops.interleave(tensor(1, 2 * channels, 9, 9), vector, 0, picture)


def compiled(call: Call, architecture: int) -> tuple[bytes, dict[str, Any]]:
    """(machine code, its entry without start and size)."""
    function = definition(call.name)
    kinds = call.key.split("(", 1)[1].split(")", 1)[0].split(",")
    widths = [place for place, name in enumerate(function.arg_names) if name in WIDTHS]
    assert all(call.args[place] % machine_code.ALIGNMENT == 0 for place in widths), call
    aligned = [place for place, kind in enumerate(kinds) if kind.startswith("*")] + widths
    code, entry = machine_code.compiled(function, kinds, call.constants, aligned, architecture, call.warps)
    return code, entry | {"widths": widths}


def build(architecture: int, wanted: dict[str, Call]) -> bytes:
    """One architecture's file."""
    kernels, codes = {}, []
    for key, call in sorted(wanted.items()):
        code, entry = compiled(call, architecture)
        kernels[key] = entry | {"start": sum(map(len, codes)), "size": len(code)}
        codes.append(code)
    header = {"source": source_digest(), "compiler": machine_code.compiler(), "kernels": kernels}
    return machine_code.file_of(header, codes)


def source_digest() -> str:
    """sha256 of the kernels' source text."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()


def main() -> None:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of the size, and no paths of this machine
    prebuilt.FOLDER.mkdir(exist_ok=True)
    for architecture in map(int, sys.argv[1:] or ARCHITECTURES):
        path, wanted = prebuilt.FOLDER / f"sm_{architecture}.bin", calls_for(architecture)
        path.write_bytes(build(architecture, wanted))
        print(f"{path.name}: {len(wanted)} kernels, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
