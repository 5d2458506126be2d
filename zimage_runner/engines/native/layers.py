"""torch's layers without weight initialisation: their tensors come from a checkpoint.

On the meta device initialising computes nothing, yet it imports torch._dynamo, which takes seconds.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """nn.Linear that leaves its parameters empty."""

    def reset_parameters(self) -> None:
        pass


class Conv2d(nn.Conv2d):
    """nn.Conv2d that leaves its parameters empty."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its parameters empty."""

    def reset_parameters(self) -> None:
        pass
