"""How one picture is drawn: the ``sampling`` config group and its resolved form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from zimage_runner.errors import UserError

SIZE_MULTIPLE = 16
"""Pictures are cut into 2x2 patches of 8x8-pixel latents."""
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEQUENCE_LENGTH = 1024
"""Upper bound on caption tokens: the rotary table of the published model has 1536 caption positions."""


@dataclass(kw_only=True, slots=True)
class Sampling:
    """Sampling fields as a user writes them; null means "what the model recommends"."""

    height: int | None = None
    """Pixels, a multiple of 16."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    num_inference_steps: int | None = None
    """Number of transformer forwards, whatever the diffusers version."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 0 turns it off, any positive value doubles the cost."""
    negative_prompt: str | None = None
    """What guidance steers away from; needs guidance_scale > 0."""
    max_sequence_length: int | None = None
    """Caption tokens, chat template included; longer prompts are truncated with a warning."""
    cfg_normalization: float | None = None
    """Cap on the guided prediction's norm as a multiple of the unguided one's; 0 means no cap."""
    cfg_truncation: float | None = None
    """Guidance stops once the normalised time (0 noise .. 1 picture) exceeds this; 1 means never."""


SAMPLING_FIELDS = tuple(f.name for f in fields(Sampling))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling fields with every null resolved. Equal params mean equal arithmetic."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str
    max_sequence_length: int
    cfg_normalization: float
    cfg_truncation: float

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _check_side(name, getattr(self, name))
        _check_range("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_range("guidance_scale", self.guidance_scale, 0.0, 100.0)
        _check_range("max_sequence_length", self.max_sequence_length, 1, MAX_SEQUENCE_LENGTH)
        _check_range("cfg_normalization", self.cfg_normalization, 0.0, 100.0)
        _check_range("cfg_truncation", self.cfg_truncation, 0.0, 1.0)
        if self.negative_prompt and not self.uses_guidance:
            raise UserError(
                f"sampling.negative_prompt={self.negative_prompt!r} has no effect with guidance_scale=0: "
                "set sampling.guidance_scale above 0 or remove the negative prompt"
            )

    @property
    def uses_guidance(self) -> bool:
        return self.guidance_scale > 0

    def overridden(self, overrides: dict[str, Any]) -> SamplingParams:
        """A copy with some fields replaced, checked again; an empty mapping returns self."""
        return replace(self, **overrides) if overrides else self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_side(name: str, value: int) -> None:
    if value % SIZE_MULTIPLE or value <= 0:
        nearest = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
        raise UserError(f"sampling.{name}={value} is not a positive multiple of {SIZE_MULTIPLE}: use {nearest}")
    if value > MAX_SIDE:
        raise UserError(f"sampling.{name}={value} is larger than {MAX_SIDE} pixels: use at most {MAX_SIDE}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails too.
    if not low <= value <= high:
        raise UserError(f"sampling.{name}={value} is out of range: use {low} to {high}")


def resolve_sampling(sampling: Sampling, recommended: dict[str, Any]) -> SamplingParams:
    """Fill the null fields of ``sampling`` from the model's recommendation."""
    values = {f: getattr(sampling, f) for f in SAMPLING_FIELDS}
    return SamplingParams(**{f: recommended[f] if v is None else v for f, v in values.items()})
