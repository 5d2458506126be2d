"""The few fused operations of the native engine: own kernels where there is a GPU, PyTorch everywhere else."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch

from zimage_runner.engines.native.quantised import Format, Quantised, Scaled


class Operations(Protocol):
    """What ``torch_ops`` defines and ``fused_ops`` computes in fewer passes over memory."""

    FUSES_BIAS: bool

    def scaled_rms_norm(self, x: torch.Tensor, scale: torch.Tensor, eps: float, into: Format | None = None) -> Any: ...

    def add_gated_norm(
        self,
        x: torch.Tensor,
        update: torch.Tensor | Scaled,
        gate: torch.Tensor,
        next_scale: torch.Tensor | None,
        eps: float,
        into: Format | None = None,
    ) -> tuple[torch.Tensor, Any]: ...

    def product_input(self, x: torch.Tensor, into: Format | None) -> torch.Tensor | Quantised: ...

    def qk_norm_rope(
        self, qkv: torch.Tensor | Scaled, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def qk_norm_rope_quantised(
        self,
        qkv: torch.Tensor | Scaled,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        scales: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def swiglu(self, w1w3: torch.Tensor | Scaled, into: Format | None = None) -> Any: ...

    def linear_float32(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def group_norm_silu(
        self,
        x: torch.Tensor,
        groups: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        silu: bool,
        before: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> torch.Tensor: ...

    def add_bias_residual(self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor: ...

    def interleave(self, phases: torch.Tensor, bias: torch.Tensor, row: int, out: torch.Tensor) -> None: ...


def choose_operations(device: str, fused: bool = True) -> Operations:
    """GPU kernels if ``fused`` is asked for and Triton is installed to make what is not prebuilt, else PyTorch's."""
    if fused and device == "cuda" and importlib.util.find_spec("triton") is not None:
        from zimage_runner.engines.native.kernels import fused_ops

        return fused_ops  # a module satisfies the protocol by its functions
    from zimage_runner.engines.native.kernels import torch_ops

    return torch_ops
