"""How one picture is drawn: the ``sampling`` config group and its resolved form."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any

from zimage_runner.errors import UserError, check_range
from zimage_runner.model import FREE_TEXT, LATENT_CHANNELS, PIXEL_MULTIPLE

OF_ITEM = "of_item"
"""Metadata of fields that may differ within a batch: their value where a batch is meant and not an item."""
OF_GUIDANCE = "of_guidance"
"""Metadata of fields that count with guidance alone: their value without it."""
OF_PICTURES = {"of_pictures": True}
"""Metadata of fields about the pictures that an item starts from."""
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEQUENCE_LENGTH = 1024
"""Upper bound on caption tokens: the rotary table of the published model has 1536 caption positions."""
MAX_LORA_WEIGHT = 100.0
"""Either way from 0. Trainers' own pictures have 1; what is beyond a few is noise."""
STRENGTH, INPAINT_STRENGTH, CONTROL_SCALE = 0.6, 1.0, 0.75
"""What holds where nothing is said: diffusers' own defaults for Z-Image's img2img, inpainting and ControlNet."""
CANNY_LOW, CANNY_HIGH = 100, 200
"""controlnet_aux's thresholds."""
CANNY_MOST = 2040
"""The steepest slope there is: from 0 to 255 in one direction and the other, by Sobel's 4."""
MAX_MASK_PIXELS = 1024
"""Upper bound on blurring, growing and cropping masks."""


class Fit(enum.Enum):
    """How a picture takes the size that is drawn."""

    crop = "crop"
    """Scaled to cover it, and what sticks out on both sides cut off."""
    pad = "pad"
    """Scaled to fit into it, and its edge continued around."""
    stretch = "stretch"
    """Each side scaled on its own."""


class Preprocess(enum.Enum):
    """What is made of a control picture before the ControlNet sees it."""

    none = "none"
    """It is a condition already: edges, depth, a pose ..."""
    canny = "canny"
    """Its edges, as OpenCV's Canny finds them."""


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

    image: str | None = field(default=None, metadata=OF_PICTURES | FREE_TEXT)
    """Picture file to start from (img2img); without height and width its own size is drawn."""
    strength: float | None = field(default=None, metadata=OF_PICTURES)
    """How much is drawn anew, above 0 to 1; null: 0.6, with a mask 1."""
    steps_after_strength: bool | None = field(default=None, metadata=OF_PICTURES)
    """num_inference_steps counts the forwards that a strength below 1 leaves, instead of those of strength 1."""
    fit: Fit | None = field(default=None, metadata=OF_PICTURES)
    """How a picture takes the drawn size: crop (null), pad or stretch."""
    mask: str | None = field(default=None, metadata=OF_PICTURES | FREE_TEXT)
    """Picture file, of image's shape, that is white where image is painted anew (inpainting)."""
    mask_blur: int | None = field(default=None, metadata=OF_PICTURES)
    """Pixels over which the mask's edge is softened; null: 4."""
    mask_grow: int | None = field(default=None, metadata=OF_PICTURES)
    """Pixels by which the mask is widened; null: 0."""
    mask_crop: int | None = field(default=None, metadata=OF_PICTURES)
    """Draw only the mask's surroundings, this many pixels around it, at the full size; null: the whole picture."""
    outpaint: str | None = field(default=None, metadata=OF_PICTURES | FREE_TEXT)
    """Pixels added to image and painted: "left,top,right,bottom", or one number for every side."""
    scale: float | None = field(default=None, metadata=OF_PICTURES)
    """Draw image at its own size times this, where neither height nor width is set."""
    tile: int | None = field(default=None, metadata=OF_PICTURES)
    """Pixels a side of overlapping tiles in which a larger image is drawn; null: 1024 above 2048, 0: never."""
    variation: float | None = field(default=None, metadata=OF_PICTURES)
    """How far the noise goes from variation_seed's (0) to the seed's own (1): neighbours of a picture."""
    variation_seed: int | None = field(default=None, metadata=OF_PICTURES)
    """Seed of the picture whose neighbours are drawn."""
    control_image: str | None = field(default=None, metadata=OF_PICTURES | FREE_TEXT)
    """Picture file that a ControlNet follows."""
    control_scale: float | None = field(default=None, metadata=OF_PICTURES)
    """How strongly the ControlNet acts; null: 0.75."""
    control_preprocess: Preprocess | None = field(default=None, metadata=OF_PICTURES)
    """What is made of control_image first: none (null), or canny, its edges."""
    canny_low: int | None = field(default=None, metadata=OF_PICTURES)
    """Weakest slope that continues an edge, 0 to 2040; null: 100."""
    canny_high: int | None = field(default=None, metadata=OF_PICTURES)
    """Weakest slope that begins an edge, 0 to 2040; null: 200."""
    control_start: float | None = field(default=None, metadata=OF_PICTURES)
    """Share of the steps, from 0, before which the ControlNet does not act yet; null: 0."""
    control_end: float | None = field(default=None, metadata=OF_PICTURES)
    """Share of the steps, up to 1, after which it acts no more; null: 1."""


SAMPLING_FIELDS = tuple(f.name for f in fields(Sampling) if not f.metadata.get("of_pictures"))
"""Those that the model recommends a value for."""
PICTURE_FIELDS = tuple(f.name for f in fields(Sampling) if f.metadata.get("of_pictures"))
"""Those about the pictures that an item starts from."""
PICTURE_FILES = ("image", "mask", "control_image")
"""Of these, the ones that name a file."""


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
class Picture:
    """A picture file that an item starts from. Equal digests are the same picture, wherever the file lies."""

    digest: str
    """sha256 of the file, hex."""
    path: str = field(compare=False)
    """Where the file is: absolute."""
    width: int = field(compare=False)
    """Pixels, as it is looked at: after a camera's rotation."""
    height: int = field(compare=False)

    def record(self) -> dict[str, Any]:
        """What a picture's record says of it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Controlnet:
    """What steers an item that has a control picture. Equal digests and conventions steer alike."""

    digest: str
    """Identity of its weights, sha256 hex."""
    convention: str
    """How it is used: see model.Convention."""
    path: str = field(compare=False)
    """Where it lies: absolute."""
    channels: int = field(compare=False)
    """Of its condition: the latents', or those of a mask and of a picture besides."""

    @property
    def sees_masks(self) -> bool:
        """Whether it is told what is painted and what is around it."""
        return self.channels > LATENT_CHANNELS

    def record(self) -> dict[str, Any]:
        """What a picture's record says of it."""
        return {name: getattr(self, name) for name in ("path", "digest", "convention")}


ANY_PICTURE = Picture(digest="", path="", width=0, height=0)
"""Stands for the picture of each item of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The pictures that an item starts from, and what is done with them. Defaults are neutral."""

    image: Picture | None = None
    """Starts from this instead of from noise."""
    strength: float = 1.0
    steps_after_strength: bool = False
    fit: Fit = Fit.crop
    mask: Picture | None = None
    mask_blur: int = 0
    mask_grow: int = 0
    mask_crop: int | None = None
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels added at the left, top, right and bottom."""
    tile: int = 0
    """Pixels a side of the tiles; 0: drawn as a whole."""
    variation: float = 1.0
    variation_seed: int | None = None
    """The noise goes from this seed's; None: it is the item's own."""
    control_image: Picture | None = None
    control_scale: float = CONTROL_SCALE
    control_preprocess: Preprocess = Preprocess.none
    canny_low: int = CANNY_LOW
    canny_high: int = CANNY_HIGH
    control_start: float = 0.0
    control_end: float = 1.0
    controlnet: Controlnet | None = None
    """What follows ``control_image``."""
    result: tuple[int, int] | None = None
    """Width and height of the finished picture where they are not those that are drawn."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"sampling.strength={self.strength:g} is out of range: use a number above 0, at most 1")
        for name in ("mask_blur", "mask_grow", "mask_crop"):
            check_range(f"sampling.{name}", getattr(self, name) or 0, 0, MAX_MASK_PIXELS)
        for side in self.outpaint:
            check_range("sampling.outpaint", side, 0, MAX_SIDE)
        check_range("sampling.variation", self.variation, 0.0, 1.0)
        check_range("sampling.control_scale", self.control_scale, 0.0, 10.0)
        for name in ("canny_low", "canny_high"):
            check_range(f"sampling.{name}", getattr(self, name), 0, CANNY_MOST)
        if self.canny_low > self.canny_high:
            raise UserError(
                f"sampling.canny_low={self.canny_low} is above sampling.canny_high={self.canny_high}: swap them"
            )
        if not 0 <= self.control_start < self.control_end <= 1:
            raise UserError(
                f"sampling.control_start={self.control_start:g} and sampling.control_end={self.control_end:g}: use "
                "shares of the steps from 0 to 1, the start below the end"
            )

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the picture with what is added around it; of control_image where there is no other."""
        picture = self.image or self.control_image or ANY_PICTURE
        left, top, right, bottom = self.outpaint
        return picture.width + left + right, picture.height + top + bottom

    @property
    def inpaints(self) -> bool:
        """Whether a part of the picture is kept as it is."""
        return self.mask is not None or any(self.outpaint)

    @property
    def kind(self) -> tuple[bool, bool, bool, int]:
        """What of it decides which calls of the model a picture takes, and of which shapes: warm-up draws each."""
        return self.image is not None, self.inpaints, self.control_image is not None, self.tile

    @property
    def files(self) -> dict[str, Picture]:
        """The pictures by their field."""
        return {name: picture for name in PICTURE_FILES if (picture := getattr(self, name)) is not None}

    def __str__(self) -> str:
        """What kind of drawing it is, for people."""
        kind = f"{'inpainting' if self.inpaints else 'img2img'} at strength {self.strength:g}"
        parts = [kind] if self.image else []
        parts += [f"tiles of {self.tile}"] if self.tile else []
        parts += ["control"] if self.control_image else []
        return ", ".join(parts)

    def of_batch(self) -> Inputs:
        """Return what the items of a batch share: which pictures they have, the steps taken, the finished size."""
        return Inputs(
            image=self.image and ANY_PICTURE,
            strength=self.strength,
            steps_after_strength=self.steps_after_strength,
            tile=self.tile,
            mask=ANY_PICTURE if self.inpaints else None,
            control_image=self.control_image and ANY_PICTURE,
            control_start=self.control_start,
            control_end=self.control_end,
            controlnet=self.controlnet,
            result=self.result,
        )

    def counts(self) -> dict[str, Any]:
        """Return what decides the picture, as JSON has it: files by their digest, and what is not neutral."""
        neutral = Inputs()
        names = [name for name in PICTURE_FIELDS if hasattr(self, name)]
        values = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(neutral, name)}
        if self.control_image is not None:
            values["control_scale"] = self.control_scale
        counts = {name: _plain(value) for name, value in values.items()}
        if self.controlnet is not None:
            counts["controlnet"] = [self.controlnet.digest, self.controlnet.convention]
        return counts

    def record(self) -> dict[str, Any]:
        """What a picture's record says: of the files their paths, digests and sizes, and what is not neutral."""
        return {
            name: picture.record() if (picture := self.files.get(name)) else value
            for name, value in self.counts().items()
        } | ({"controlnet": self.controlnet.record()} if self.controlnet else {})


def _plain(value: Any) -> Any:
    if isinstance(value, Picture):
        return value.digest
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


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
    inputs: Inputs | None = None
    """The pictures that it starts from; None: it starts from noise."""

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
    def kind(self) -> tuple[object, ...]:
        """Of its inputs; empty for a picture from noise alone."""
        return self.inputs.kind if self.inputs else ()

    @property
    def whole_or_tile(self) -> tuple[int, int]:
        """Height and width of what the model sees at a time."""
        tile = self.inputs.tile if self.inputs else 0
        return (min(self.height, tile), min(self.width, tile)) if tile else (self.height, self.width)

    @property
    def forwards(self) -> int:
        """How often the transformer is called for a picture, without guidance: fewer than the steps below strength 1.

        N - int(N - N * strength), as diffusers' img2img pipeline counts.
        """
        steps = self.num_inference_steps
        if self.inputs is None or self.inputs.steps_after_strength:
            return steps
        return steps - int(max(steps - min(steps * self.inputs.strength, steps), 0))

    @property
    def encoder_loras(self) -> tuple[Lora, ...]:
        """The adapters that decide caption features: those that change the text encoder."""
        return tuple(lora for lora in self.loras if lora.encodes)

    def of_batch(self) -> SamplingParams:
        """Return what items must share to be drawn together: fields that concern one item alone are neutral in it."""
        return replace(
            self,
            inputs=self.inputs and self.inputs.of_batch(),
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


def nearest_side(side: float) -> int:
    """Return the nearest number of pixels that a side may have."""
    return max(PIXEL_MULTIPLE, round(side / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)


def _check_side(name: str, value: int) -> None:
    if value % PIXEL_MULTIPLE or value <= 0:
        raise UserError(
            f"sampling.{name}={value} is not a positive multiple of {PIXEL_MULTIPLE}: use {nearest_side(value)}"
        )
    if value > MAX_SIDE:
        raise UserError(f"sampling.{name}={value} is larger than {MAX_SIDE} pixels: use at most {MAX_SIDE}")


def resolve_sampling(sampling: Sampling, recommended: dict[str, Any]) -> SamplingParams:
    """Fill the null fields of ``sampling`` from the model's recommendation."""
    values = {f: getattr(sampling, f) for f in SAMPLING_FIELDS}
    return SamplingParams(**{f: recommended[f] if v is None else v for f, v in values.items()})
