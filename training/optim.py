"""Muon for matrices, AdamW for the rest, and an exponential moving average of the weights."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MATRICES = ("attention", "feed_forward", "self_attn", "mlp.gate", "mlp.up", "mlp.down")


def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, batched: [n, rows, columns].

    Quintic coefficients of Keller Jordan's Muon.
    """
    x = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


def muon_direction(gradient: Tensor, momentum: Tensor) -> Tensor:
    """Nesterov momentum of 0.95 (updated in place), orthogonalised."""
    momentum.lerp_(gradient, 0.05)
    return orthogonalise(gradient.lerp(momentum, 0.95))


class Muon:
    """Momentum orthogonalised by Newton-Schulz, one batched update a matrix shape."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.02) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.momentum = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.groups.items()}
        cuda = any(ps[0].is_cuda for ps in self.groups.values())
        self.direction = torch.compile(muon_direction, dynamic=False) if cuda else muon_direction

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate."""
        lr = self.lr * factor
        for shape, parameters in self.groups.items():
            update = self.direction(
                torch.stack([g for p in parameters if (g := p.grad) is not None]), self.momentum[shape]
            )
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            # update entries have RMS 1 / sqrt(max side); 0.2 sqrt(max side) gives them AdamW's usual size
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-lr * 0.2 * max(shape) ** 0.5)


class Optimizers:
    """Muon on the matrices inside blocks, AdamW on embeddings, norms, modulations and the output."""

    def __init__(self, modules: list[nn.Module], muon_lr: float, adam_lr: float) -> None:
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        matrices = [
            p
            for n, p in named
            if p.dim() == 2 and any(k in n for k in MATRICES) and "norm" not in n and "adaLN" not in n
        ]
        chosen = {id(p) for p in matrices}
        self.parameters = [p for _, p in named]
        self.muon = Muon(matrices, muon_lr)
        others = [p for p in self.parameters if id(p) not in chosen]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda)
        self.adam_lr = adam_lr

    def gradients(self) -> list[Tensor]:
        """All gradients; every parameter must have one."""
        return [g for p in self.parameters if (g := p.grad) is not None]

    def step(self, factor: float) -> None:
        """Update all at `factor` times the learning rates, and drop the gradients."""
        self.muon.step(factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None

    def forget(self) -> None:
        """Drop all momentum: what was stepped on so far was for compilation only."""
        self.adam.state.clear()
        for momentum in self.muon.momentum.values():
            momentum.zero_()


class Average:
    """Exponential moving average of parameters, warmed up so that early steps count little."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.live, self.decay, self.steps = parameters, decay, 0
        self.mean = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Fold in the current weights."""
        torch._foreach_lerp_(self.mean, list(self.live), 1 - min(self.decay, (1 + self.steps) / (20 + self.steps)))
        self.steps += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the average; call twice to go there and back."""
        for live, mean in zip(self.live, self.mean):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)
