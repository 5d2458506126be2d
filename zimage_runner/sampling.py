"""How one picture is drawn: the ``sampling`` config group and its resolved form."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from zimage_runner.errors import UserError, check_range
from zimage_runner.model import FREE_TEXT, PIXEL_MULTIPLE

OF_ITEM = "of_item"
"""Metadata of fields that may differ within a batch: their value where a batch is meant and not an item."""
OF_GUIDANCE = "of_guidance"
"""Metadata of fields that count with guidance alone: their value without it."""
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEQUENCE_LENGTH = 1024
"""Upper bound on caption tokens: the rotary table of the published model has 1536 caption positions."""
MAX_LORA_WEIGHT = 100.0
"""Either way from 0. Trainers' own pictures have 1; what is beyond a few is noise."""


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
    negative_prompt: str | None = field(default=None, metadata=FREE_TEXT)
    """What guidance steers away from; needs guidance_scale > 0."""
    max_sequence_length: int | None = None
    """Caption tokens, chat template included; longer prompts are truncated with a warning."""
    cfg_normalization: float | None = None
    """Cap on the guided prediction's norm as a multiple of the unguided one's; 0 means no cap."""
    cfg_truncation: float | None = None
    """Guidance stops once the normalised time (0 noise .. 1 picture) exceeds this; 1 means never."""


SAMPLING_FIELDS = tuple(f.name for f in fields(Sampling))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """An adapter file (a LoRA or a relative of it) and how strongly it is applied.

    Equal digest and weight are the same adapter, wherever its file lies and whatever it is called.
    """

    digest: str
    """sha256 of the file, hex."""
    weight: float
    """0 would leave the model as it is, 1 is what was trained."""
    name: str = field(compare=False)
    """The file's name without its suffix."""
    path: str = field(compare=False)
    """Where the file is, as it was named: absolute, or relative to where the program was started."""
    hash: str = field(compare=False)
    """The 12 digits by which image tools and Civitai know it (see weights/adapters/adapter.py)."""
    encodes: bool = field(compare=False)
    """Whether it changes the text encoder too."""

    def __str__(self) -> str:
        return f"{self.name} {self.weight:g}"

    def record(self) -> dict[str, Any]:
        """What a picture's record says of it."""
        return {name: getattr(self, name) for name in ("name", "path", "digest", "hash", "weight")}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling fields with every null resolved, and the adapters. Equal params mean equal arithmetic."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str = field(metadata={OF_ITEM: ""})
    max_sequence_length: int = field(metadata={OF_ITEM: 1})
    cfg_normalization: float = field(metadata={OF_GUIDANCE: 0.0})
    cfg_truncation: float = field(metadata={OF_GUIDANCE: 1.0})
    loras: tuple[Lora, ...] = ()
    """Merged into the weights one after another, in this order."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _check_side(name, getattr(self, name))
        check_range("sampling.num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("sampling.guidance_scale", self.guidance_scale, 0.0, 100.0)
        check_range("sampling.max_sequence_length", self.max_sequence_length, 1, MAX_SEQUENCE_LENGTH)
        check_range("sampling.cfg_normalization", self.cfg_normalization, 0.0, 100.0)
        check_range("sampling.cfg_truncation", self.cfg_truncation, 0.0, 1.0)
        for lora in self.loras:
            check_range(f"the weight of {lora.name}", lora.weight, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)
        if self.negative_prompt and not self.uses_guidance:
            raise UserError(
                f"sampling.negative_prompt={self.negative_prompt!r} has no effect with guidance_scale=0: "
                "set sampling.guidance_scale above 0 or remove the negative prompt"
            )

    @property
    def uses_guidance(self) -> bool:
        return self.guidance_scale > 0

    @property
    def encoder_loras(self) -> tuple[Lora, ...]:
        """The adapters that decide caption features: those that change the text encoder."""
        return tuple(lora for lora in self.loras if lora.encodes)

    def of_batch(self) -> SamplingParams:
        """Return what items must share to be drawn together: fields that concern one item alone are neutral in it."""
        return replace(
            self,
            **{f.name: f.metadata[OF_ITEM] for f in fields(self) if OF_ITEM in f.metadata}
            | (
                {}
                if self.uses_guidance
                else {f.name: f.metadata[OF_GUIDANCE] for f in fields(self) if OF_GUIDANCE in f.metadata}
            ),
        )

    def overridden(self, overrides: dict[str, Any]) -> SamplingParams:
        """A copy with some fields replaced, checked again; an empty mapping returns self."""
        return replace(self, **overrides) if overrides else self

    def to_dict(self) -> dict[str, Any]:
        """Return the sampling fields by name, without the adapters."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS}


def _check_side(name: str, value: int) -> None:
    if value % PIXEL_MULTIPLE or value <= 0:
        nearest = max(PIXEL_MULTIPLE, round(value / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
        raise UserError(f"sampling.{name}={value} is not a positive multiple of {PIXEL_MULTIPLE}: use {nearest}")
    if value > MAX_SIDE:
        raise UserError(f"sampling.{name}={value} is larger than {MAX_SIDE} pixels: use at most {MAX_SIDE}")


def resolve_sampling(sampling: Sampling, recommended: dict[str, Any]) -> SamplingParams:
    """Fill the null fields of ``sampling`` from the model's recommendation."""
    values = {f: getattr(sampling, f) for f in SAMPLING_FIELDS}
    return SamplingParams(**{f: recommended[f] if v is None else v for f, v in values.items()})
