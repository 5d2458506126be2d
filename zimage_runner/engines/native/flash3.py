"""FlashAttention 3's forward product: its compiled operator alone, where that is the one we know.

The packages' Python interfaces also define operators for tracing and training. Importing one took 3.2 s in a process
whose torch is imported lean, because torch.library then needs everything that the lean import had put off.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

INTERFACES = ("flash_attn_interface", "fa3_fwd_interface")
"""FlashAttention 3's own build, and its forward half as the package fa3-fwd."""
EXTENSIONS = ("flash_attn_3", "fa3_fwd")
"""Their packages with the compiled part, whose operators have the package's name too."""
ARGUMENTS = (
    "q", "k", "v", "k_new", "v_new", "q_v", "out",
    "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k",
    "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary",
    "q_descale", "k_descale", "v_descale", "softmax_scale", "is_causal", "window_size_left", "window_size_right",
    "attention_chunk", "softcap", "is_rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin",
)  # fmt: skip
"""Of the operator ``fwd`` that ``load_flash3`` knows how to call. All but the first three have neutral defaults."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def load_flash3() -> Forward:
    """(query, key, value), each [batch, tokens, heads, head_dim], to the like. Raises ImportError if not installed."""
    for package in EXTENSIONS:
        operator = _operator(package)
        if operator is not None:
            return _direct(operator)
    return _through_interface()


def load_flash3_fp8() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """(query, key, value of e4m3, their scales [3, heads]) to bfloat16. Raises ImportError if not installed."""
    operators = [operator for package in EXTENSIONS if (operator := _operator(package)) is not None]
    if not operators:
        raise ImportError("FlashAttention 3's operator is not installed: pip install fa3-fwd")
    operator = operators[0]

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        q, k, v = scales[:, None].expand(3, len(query), -1).unbind(0)
        return operator(
            query, key, value, q_descale=q, k_descale=k, v_descale=v,
            softmax_scale=query.shape[-1] ** -0.5, num_splits=1,
        )[0]  # fmt: skip

    return forward


def _operator(package: str) -> Any:
    """The package's operator ``fwd``, None if there is none or it takes other arguments."""
    library = _library(package)
    if library is None:
        return None
    try:
        torch.ops.load_library(str(library))
        operator = getattr(torch.ops, package).fwd.default
    except (OSError, AttributeError) as error:  # built for another torch; its interface will say so
        log.debug("%s: %s", library, error)
        return None
    names = tuple(argument.name for argument in operator._schema.arguments)
    return operator if names == ARGUMENTS else None


def _library(package: str) -> Path | None:
    """The package's compiled part, found without importing anything."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("_C.*"))), None)


def _direct(operator: Any) -> Forward:
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # As flash_attn_func(query, key, value) calls it; num_splits=0 would choose by a heuristic.
        return operator(query, key, value, softmax_scale=query.shape[-1] ** -0.5, num_splits=1)[0]

    return forward


def _through_interface() -> Forward:
    interface = _first_interface()

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = interface.flash_attn_func(query, key, value)
        return out[0] if isinstance(out, tuple) else out  # older builds also return the log-sum-exp

    return forward


def _first_interface() -> Any:
    for name in INTERFACES[:-1]:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return importlib.import_module(INTERFACES[-1])
