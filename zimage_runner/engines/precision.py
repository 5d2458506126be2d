"""In what the transformer's matrix products are computed: ``engine.precision``. Imports no torch by itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError, counted

if TYPE_CHECKING:
    from zimage_runner.engines.base import Device
    from zimage_runner.model import Model

FP8_CAPABILITY = (8, 9)
"""Compute capability from which GPUs multiply e4m3 numbers: Ada (RTX 40, L4), Hopper, Blackwell."""
INT8_CAPABILITY = (8, 0)


class Precision(enum.Enum):
    """Everything but the transformer blocks' matrix products is computed in bfloat16 whatever it is."""

    bf16 = "bf16"
    fp8 = "fp8"
    """e4m3, with a scale for each row of weights and of activations."""
    int8 = "int8"
    """The same in integers, after rotating groups of 256 inputs: for GPUs without fp8."""
    int4 = "int4"
    """Refused: it draws another picture."""


def check_precision(precision: Precision, device: Device, model: Model) -> None:
    """Raise UserError for what no machine can do."""
    name = f"engine.precision={precision.value}"
    if precision is Precision.int4:
        raise UserError(f"{name} draws another picture than the model's: use engine.precision=fp8 or int8, or bf16")
    if precision is Precision.bf16:
        return
    if device.value == "cpu":
        raise UserError(_on_cpu(name))
    if model.dtype.value == "float32":
        raise UserError(f"{name} and model.dtype=float32 contradict each other: use one of them")


def check_device(precision: Precision, device: str, dtype: str) -> None:
    """Raise UserError where this machine cannot compute in ``precision``, now that device and compute dtype are known.

    A GPU is asked to multiply once: what torch says that it can and what it does are not always one.
    """
    if precision is Precision.bf16:
        return
    name = f"engine.precision={precision.value}"
    if device != "cuda":
        raise UserError(_on_cpu(name))
    import torch

    card, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    needed = FP8_CAPABILITY if precision is Precision.fp8 else INT8_CAPABILITY
    instead = "engine.precision=int8 or bf16" if precision is Precision.fp8 else "engine.precision=bf16"
    if capability < needed:
        have, wanted = (".".join(map(str, numbers)) for numbers in (capability, needed))
        raise UserError(f"{name} needs a GPU of compute capability {wanted}, {card} has {have}: use {instead}")
    if dtype != "bfloat16":
        raise UserError(f"{name} computes with bfloat16 beside it, and model.dtype={dtype}: use model.dtype=bfloat16")
    from zimage_runner.engines.native.quantised import try_product

    reason = try_product(precision.value)
    if reason is not None:
        raise UserError(f"{name} does not run here (torch {torch.__version__}, {card}: {reason}): use {instead}")


def likeness_key(digest: str | None, numerics: Mapping[str, Any]) -> str | None:
    """Under which name is kept what ``compare`` found out of these weights in this precision; None in bf16."""
    said = likeness_numerics(numerics)
    eight = "precision" in said or str(said.get("attention", "")).endswith("_fp8")
    return repr((digest, sorted(said.items()))) if eight and digest is not None else None


def likeness_numerics(numerics: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how near pictures in eight bits come to those in bf16."""
    return {name: numerics[name] for name in ("precision", "bf16_layers", "attention") if name in numerics}


def likeness_text(known: Mapping[str, Any]) -> str:
    """What ``compare`` found, for people."""
    psnr, flip = (known["likeness"][name] for name in ("psnr", "flip"))
    floor = f"; noise floor {known['floor']['psnr']['mean']:.1f} dB" if "floor" in known else ""
    figures = f"PSNR {psnr['mean']:.1f} dB (worst {psnr['worst']:.1f}), FLIP {flip['mean']:.3f} ({flip['worst']:.3f})"
    return f"{figures}, {counted(known['pictures'], 'picture')}{floor}"


def _on_cpu(name: str) -> str:
    return f"{name} needs a CUDA GPU: it would be slower than engine.precision=bf16 on a CPU; leave it out"
