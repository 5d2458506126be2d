"""The noise schedule, Euler steps and classifier-free guidance, as diffusers' ZImagePipeline computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRAIN_TIMESTEPS = 1000
"""Timesteps are sigmas times this; the published scheduler and pipeline agree on 1000."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One forward a step: sigmas[i] is its noise level, times[i] = 1 - sigmas[i] what the network is told.

    float32 on the CPU; sigmas has one more element, the final 0.
    """

    sigmas: torch.Tensor
    times: torch.Tensor

    def deltas(self) -> list[float]:
        """sigma_next - sigma of each step: negative."""
        return (self.sigmas[1:] - self.sigmas[:-1]).tolist()


def make_schedule(num_inference_steps: int, shift: float, strength: float = 1.0, exact: bool = False) -> Schedule:
    """linspace(1, 1/n, n) shifted by s * sigma / (1 + (s - 1) * sigma), then 0: as many forwards as steps.

    A strength below 1 leaves the last n - int(n - n * strength) of them, as diffusers' img2img pipeline does. ``exact``
    takes n forwards all the same: linspace(strength, strength/n, n), the last n of n / strength steps.
    """
    first = strength if exact else 1.0
    sigmas = torch.linspace(first, first / num_inference_steps, num_inference_steps, dtype=torch.float32)
    if not exact:
        sigmas = sigmas[int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0)) :]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    # The detour through 1000 rounds as the pipeline does.
    times = (TRAIN_TIMESTEPS - sigmas * TRAIN_TIMESTEPS) / TRAIN_TIMESTEPS
    return Schedule(torch.cat([sigmas, torch.zeros(1)]), times)


def read_shift(config: Mapping[str, Any]) -> float:
    """The static shift of a published scheduler_config.json. Raises ValueError for a scheduler of another kind."""
    only = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    }
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ValueError(f"scheduler_config.json: {name}={config[name]!r} is not supported, only {value!r}")
    return float(config.get("shift", 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance; a scale of 0 is none."""

    scale: float = 0.0
    normalization: float = 0.0
    """Cap on the guided velocity's norm, as a multiple of the unguided one's; 0 is no cap."""
    truncation: float = 1.0
    """No guidance in steps whose time exceeds this."""

    def active(self, time: float) -> bool:
        """Whether the step at ``time`` is guided."""
        return self.scale > 0 and not (self.truncation <= 1 and time > self.truncation)

    def combine(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """positive + scale * (positive - negative), capped per picture. All [batch, channels, height, width]."""
        guided = positive + self.scale * (positive - negative)
        if not self.normalization:
            return guided
        limit = _norm(positive) * float(self.normalization)
        norm = _norm(guided)
        # A ratio of 1 where the cap is not reached: no branch, so that the host need not wait for the norm.
        return guided * torch.where(norm > limit, limit / norm, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What is drawn from instead of noise."""

    latents: torch.Tensor
    """[batch, channels, height, width] float32."""
    strength: float
    """How much is drawn anew: where the schedule begins."""
    exact: bool = False
    """Take all steps whatever the strength; see ``make_schedule``."""
    mask: torch.Tensor | None = None
    """[batch, 1, height, width] float32, 1 where it is drawn, 0 where the latents stay; None: everywhere."""
    tile: int = 0
    """Latent positions a side of the overlapping tiles that are predicted one by one; 0: all at once."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of the picture before it is drawn, on the model's device."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None

    def at(self, sigma: float) -> torch.Tensor:
        """The latents at a noise level."""
        return sigma * self.noise + (1 - sigma) * self.latents

    def put_back(self, drawn: torch.Tensor, sigma: float) -> torch.Tensor:
        """What was drawn where the mask is, what is known elsewhere."""
        assert self.mask is not None
        return (1 - self.mask) * self.at(sigma) + self.mask * drawn


Predict = Callable[[int, torch.Tensor, bool], torch.Tensor]
"""(step, latents, with the negative prompt?) to velocity float32; twice the batch, positive first, if with."""


def euler(
    latents: torch.Tensor, schedule: Schedule, guidance: Guidance, predict: Predict, kept: Kept | None = None
) -> torch.Tensor:
    """Integrate from noise to a picture; latents [batch, channels, height, width] float32.

    ``predict`` gives picture minus noise, the negative of d latents / d sigma. ``kept`` is put back after each step.
    """
    times = schedule.times.tolist()
    for step, delta in enumerate(schedule.deltas()):
        guided = guidance.active(times[step])
        velocity = predict(step, latents, guided)
        if guided:
            velocity = guidance.combine(*velocity.chunk(2))
        latents = torch.add(latents, velocity, alpha=-delta)
        if kept is not None:
            latents = kept.put_back(latents, schedule.sigmas[step + 1].item())
    return latents


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
