"""Choosing the attention kernel: PyTorch's scaled dot product attention backends, or FlashAttention 3.

No mask is ever needed: items of one batch have equal padded lengths, and padding tokens are attended to.
On an H200, 30 heads x 4128 x 128: FlashAttention 3 ran at 511 to 578 TFLOP/s, cuDNN's kernel at 536, PyTorch's flash
kernel at 325; eight forwards took 3.3 % less time with FlashAttention 3 than with cuDNN.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from zimage_runner.engines.native import flash3
from zimage_runner.errors import UserError
from zimage_runner.weights import cache
from zimage_runner.weights.eight_bits import FP8, to_format

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value), each [batch, tokens, heads, head_dim], to [batch, tokens, heads, head_dim]."""

AttendFp8 = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The same of e4m3 numbers; the fourth argument has their scales [3, heads] float32. The result is bfloat16."""

SDPA_BACKENDS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
LARGEST_ERROR = {False: 0.05, True: 0.2}
"""Absolute, of an attention over normally distributed numbers; True: in eight bits."""
CUDA_ORDER = ("flash3", "cudnn", "flash", "efficient", "math")
FP8_BACKEND = "flash3_fp8"
"""FlashAttention 3 of e4m3 numbers. It draws another picture, so that ``auto`` never takes it."""
BACKENDS = ("auto", "native", *CUDA_ORDER, FP8_BACKEND)


@dataclass(frozen=True, slots=True)
class Attention:
    """A backend: its name, the call, and the context to enter once around many calls."""

    name: str
    attend: Attend
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    attend_fp8: AttendFp8 | None = None
    """What the transformer's blocks use instead, where it is there."""


def scaled_dot_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v; the backend is whatever the surrounding context allows."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def choose_attention(name: str, device: str, dtype: torch.dtype, head_dim: int) -> Attention:
    """The backend of that name; ``auto`` takes the fastest that computes right on this machine.

    Raises ValueError for a name that is unknown, UserError for one that does not run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"engine.attention={name} is unknown: use one of {', '.join(BACKENDS)}")
    if name == "native" or (name == "auto" and device != "cuda"):
        return Attention("native", scaled_dot_product)
    if device != "cuda":
        raise UserError(f"engine.attention={name} needs a CUDA GPU: use auto or native")
    if name == "auto":
        return _fastest(dtype, head_dim)
    attention, reason = try_attention(name, dtype, head_dim)
    if attention is None:
        raise UserError(f"engine.attention={name} does not run here ({reason}): use auto or native")
    return attention


def _fastest(dtype: torch.dtype, head_dim: int) -> Attention:
    """The first that computes right; what was found out is kept for the next process, whose first picture it delays."""
    key = _machine_key(dtype, head_dim)
    known = cache.read_entry("attention", key)
    if known is not None and known.get("backend") in CUDA_ORDER:
        with contextlib.suppress(ImportError):
            return _backend(known["backend"])
    for candidate in CUDA_ORDER:
        attention, _ = try_attention(candidate, dtype, head_dim)
        if attention is not None:
            cache.write_entry("attention", key, {"backend": candidate})
            return attention
    return Attention("native", scaled_dot_product)


def _machine_key(dtype: torch.dtype, head_dim: int) -> str:
    """Everything that decides which backends compute right."""
    found = [name for name in flash3.INTERFACES if importlib.util.find_spec(name) is not None]
    versions = (torch.__version__, torch.version.cuda, torch.backends.cudnn.version())
    return repr(
        (torch.cuda.get_device_name(), torch.cuda.get_device_capability(), versions, found, str(dtype), head_dim)
    )


def _backend(name: str) -> Attention:
    if name == FP8_BACKEND:
        return Attention(name, flash3.load_flash3(), attend_fp8=flash3.load_flash3_fp8())
    return Attention("flash3", flash3.load_flash3()) if name == "flash3" else _sdpa(name)


def try_attention(name: str, dtype: torch.dtype, head_dim: int) -> tuple[Attention | None, str]:
    """The backend if a small attention through it agrees with plain arithmetic; else None and why not."""
    try:
        attention = _backend(name)
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, 96, 2, head_dim)
        query, key, value = (torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in range(3))
        with attention.context():
            got = _attended(attention, query, key, value)
    except (ImportError, RuntimeError) as error:
        return None, " ".join(str(error).split())[:200] or type(error).__name__
    expected = plain_attention(query, key, value)
    difference = (got.float() - expected).abs().max().item()
    # NaN must not pass, hence the form of the comparison.
    return (
        (attention, "")
        if difference < LARGEST_ERROR[attention.attend_fp8 is not None]
        else (None, f"its result is off by {difference:.3g}")
    )


def _attended(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The backend's result, which rounds what it is given first if that is its way."""
    if attention.attend_fp8 is None:
        return attention.attend(query, key, value)
    scales = torch.stack([x.float().abs().amax((0, 1, 3)) / FP8.largest for x in (query, key, value)])
    eight = [to_format(x / scale[:, None], FP8) for x, scale in zip((query, key, value), scales)]
    return attention.attend_fp8(eight[0], eight[1], eight[2], scales)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition in float32, for checking; [batch, tokens, heads, head_dim]."""
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2)


def _sdpa(name: str) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, SDPA_BACKENDS[name])
    return Attention(name, scaled_dot_product, lambda: sdpa_kernel(backend))
