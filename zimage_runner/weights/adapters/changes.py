"""What an adapter does to one weight matrix: W -> W', computed in float32 on the device that W is on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Change(ABC):
    """A change of one weight. ``strength`` 0 leaves it as it is, 1 is what was trained; negative ones are allowed."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is for."""

    @abstractmethod
    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        """The changed weight, a new float32 tensor; ``weight`` float32, of the change's shape."""


class Additive(Change):
    """W' = W + strength * difference."""

    @abstractmethod
    def difference(self, like: torch.Tensor) -> torch.Tensor:
        """W' - W at strength 1: float32, on the device of ``like``, in its own shape."""

    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        return weight.add(self.difference(weight).reshape(weight.shape), alpha=strength)


@dataclass(frozen=True, slots=True)
class LowRank(Additive):
    """LoRA: scale * up [out, rank] @ down [rank, in] (Hu et al. 2021); scale is alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def difference(self, like: torch.Tensor) -> torch.Tensor:
        return (_float32(self.up, like) @ _float32(self.down, like)).mul_(self.scale)

    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        import torch

        up, down = _float32(self.up, weight), _float32(self.down, weight)
        return torch.addmm(weight, up, down, alpha=self.scale * strength)


@dataclass(frozen=True, slots=True)
class Hadamard(Additive):
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element (Hyeon-Woo et al. 2021, FedPara)."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def difference(self, like: torch.Tensor) -> torch.Tensor:
        first = _float32(self.w1_a, like) @ _float32(self.w1_b, like)
        return first.mul_(_float32(self.w2_a, like) @ _float32(self.w2_b, like)).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Kronecker(Additive):
    """LoKr: scale * kron(w1, w2), either factor whole or itself a product of two (LyCORIS)."""

    w1: tuple[torch.Tensor, ...]
    w2: tuple[torch.Tensor, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        (rows1, columns1), (rows2, columns2) = _product_shape(self.w1), _product_shape(self.w2)
        return rows1 * rows2, columns1 * columns2

    def difference(self, like: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.kron(_product(self.w1, like), _product(self.w2, like)).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Difference(Additive):
    """The difference itself, of a matrix, a bias or a norm's weight."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def difference(self, like: torch.Tensor) -> torch.Tensor:
        return _float32(self.value, like)


@dataclass(frozen=True, slots=True)
class Replacement(Change):
    """Another value in the weight's place; between 0 and 1 a point on the line from one to the other."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        return weight.lerp(_float32(self.value, weight).reshape(weight.shape), strength)


@dataclass(frozen=True, slots=True)
class Decomposed(Change):
    """DoRA: magnitude * V / |V| with V = W + difference, |V| along a row or a column (Liu et al. 2024).

    At other strengths a point on the line from W to that, as ComfyUI does; peft scales the difference inside instead.
    """

    inner: Additive
    magnitude: torch.Tensor
    """[out] or [out, 1]: of each row; [1, in]: of each column."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def is_by_column(self) -> bool:
        """Whether a magnitude belongs to an input channel: then V's norm runs over all of its rows."""
        return self.magnitude.ndim == 2 and self.magnitude.shape[1] != 1

    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        direction = self.inner.apply(weight, 1.0)
        magnitude = _float32(self.magnitude, weight)
        if self.is_by_column:
            norm = direction.norm(dim=0, keepdim=True)
        else:
            norm, magnitude = direction.norm(dim=1, keepdim=True), magnitude.reshape(-1, 1)
        # A row of zeros has no direction and stays zero.
        direction.mul_(magnitude / norm.clamp_min(1e-30))
        return direction if strength == 1.0 else weight.lerp(direction, strength)


def _float32(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(like.device).float()


def _product(factors: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    whole = _float32(factors[0], like)
    return whole if len(factors) == 1 else whole @ _float32(factors[1], like)


def _product_shape(factors: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]
