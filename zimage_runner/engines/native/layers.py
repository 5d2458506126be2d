"""torch's layers without weight initialisation: their tensors come from a checkpoint.

On the meta device initialising computes nothing, yet it imports torch._dynamo, which takes seconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PACKED_ELEMENTS = 2**22
"""Largest weight that is kept a second time, packed: 16 MiB, four times the embedded model's largest."""


class Linear(nn.Linear):
    """nn.Linear that leaves its parameters empty."""

    def reset_parameters(self) -> None:
        pass


class PackedLinear(Linear):
    """Linear without bias that on an x86 CPU multiplies by a small float32 weight in oneDNN's own layout.

    Against MKL's product this takes a tenth (one thread) to a third (two) off a product of a hundred tokens: there is
    nothing to rearrange in each call and one barrier fewer. The weight is packed at the first call, for all later ones.
    """

    _packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            if not can_pack(self.weight):
                return F.linear(x, self.weight)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch has oneDNN's packed product, which Inductor uses too, and it pays for this weight."""
    return (
        not weight.is_cuda
        and weight.dtype == torch.float32
        and weight.numel() <= PACKED_ELEMENTS
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Conv2d(nn.Conv2d):
    """nn.Conv2d that leaves its parameters empty."""

    def reset_parameters(self) -> None:
        pass
