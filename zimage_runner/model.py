"""Which weights a run uses: the ``model`` config group."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError

CAPTION_MULTIPLE = 32
"""The transformer pads captions, and images, to this multiple of tokens with learned tokens that are attended to."""
VAE_FACTOR = 8
"""Pixels a side of one latent position."""
PATCH = 2
"""Latent positions a side of one image token."""
PIXEL_MULTIPLE = VAE_FACTOR * PATCH
"""Sides of pictures are multiples of this."""
LATENT_CHANNELS = 16


def padded_length(tokens: int) -> int:
    """Return ``tokens`` rounded up to a multiple of CAPTION_MULTIPLE."""
    return -(-tokens // CAPTION_MULTIPLE) * CAPTION_MULTIPLE


def unshifted_sigmas(steps: int) -> list[float]:
    """Return the noise levels linspace(1, 1/steps, steps): one for each forward, before the model's static shift.

    In double precision. engine=native computes the same in float32 as torch.linspace does, whose last bit often is
    another: its pictures are made with that.
    """
    return [1.0 - i * (1.0 - 1.0 / steps) / (steps - 1) if steps > 1 else 1.0 for i in range(steps)]


HARMLESS = {"harmless": True}
"""Metadata of config fields and groups that decide how a picture is made and kept, not what it shows: a resumed run may
change them."""


FREE_TEXT = {"free_text": True}
"""Metadata of config fields that hold a text or a path with blanks, brackets and any script: the command line quotes
them for Hydra. A path is a sweep in a multirun only when its values are quoted one by one, like a prompt's."""


EMBEDDED_CONTROLNET = "embedded"
"""In place of a path to a ControlNet: the one that comes with the embedded model."""
EMBEDDED_CONTROLNET_FILE = "zimage_nano_canny.safetensors"


class Source(enum.Enum):
    """Where the checkpoint comes from. ``model.path`` wins over it."""

    embedded = "embedded"
    modelscope = "modelscope"
    huggingface = "huggingface"
    local = "local"


class Device(enum.Enum):
    """Where the model runs. ``auto`` is cuda where there is a GPU, else cpu."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Dtype(enum.Enum):
    """Compute dtype; ``auto`` is bfloat16 on a GPU and float32 on the CPU. float16 is refused for Z-Image."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


class Verify(enum.Enum):
    """How much of the weights is checked before loading. Sizes and safetensors headers always are."""

    headers = "headers"
    first_use = "first_use"
    """sha256 once for each file, remembered by path, size, mtime and inode."""
    always = "always"
    """sha256 at every start: tens of seconds for Z-Image-Turbo."""


class Prepare(enum.Enum):
    """When an engine that can use a prepared checkpoint (bf16, one file a component) makes one."""

    auto = "auto"
    """On first use of weights larger than 1 GB, where the disk has room for it."""
    always = "always"
    """As auto, for small models too."""
    never = "never"
    """Load the published files."""


class Variant(enum.Enum):
    """Which of the two models a file is of: nothing in the file tells."""

    turbo = "turbo"
    """Z-Image-Turbo: 8 steps without guidance, shift 3."""
    base = "base"
    """Z-Image: 28 to 50 steps with guidance and negative prompts, shift 6."""


class Convention(enum.Enum):
    """How a ControlNet is used: two programs read the same files in two ways."""

    trained = "trained"
    """As VideoX-Fun, which trained the published files, and ComfyUI: without a mask the whole picture counts as the
    hole of a grey one, and what the ControlNet gives the noise refiner reaches the picture."""
    diffusers = "diffusers"
    """As ZImageControlNetPipeline: without a mask the channels for mask and picture are zeros, and what it gives the
    noise refiner reaches the ControlNet alone."""


PARTS = ("transformer", "text_encoder", "vae", "tokenizer")
"""Fields of ``model`` that put one part in the place of the checkpoint's own."""
FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""Of files of weights, readable or not: a name that ends so means a file."""


def names_a_file(path: str | None) -> bool:
    """Whether a path means a file of weights, there or not."""
    if path is None:
        return False
    place = Path(path).expanduser()
    return place.is_file() or (path.lower().endswith(FILE_SUFFIXES) and not place.is_dir())


@dataclass(kw_only=True, slots=True)
class Model:
    """A Z-Image checkpoint and what its makers recommend for sampling."""

    name: str
    source: Source = Source.modelscope
    repo: str | None = None
    """Repository id on the hub, owner/name."""
    revision: str | None = None
    """Hub branch, tag or commit; null is the hub's default branch."""
    path: str | None = field(default=None, metadata=FREE_TEXT)
    """A local diffusers-format directory to use instead of the hub, or a file, which the hub's checkpoint completes."""
    transformer: str | None = field(default=None, metadata=FREE_TEXT)
    """A file or directory to take the transformer from, instead of the checkpoint's own."""
    text_encoder: str | None = field(default=None, metadata=FREE_TEXT)
    """A file or directory to take the text encoder from."""
    vae: str | None = field(default=None, metadata=FREE_TEXT)
    """A file or directory to take the VAE from."""
    tokenizer: str | None = field(default=None, metadata=FREE_TEXT)
    """A directory to take the tokenizer from."""
    controlnet: str | None = field(default=None, metadata=FREE_TEXT)
    """A ControlNet, a file or its directory, for pictures with a control_image; embedded: zimage_nano's, of edges."""
    controlnet_convention: Convention = Convention.trained
    """How it is used: trained, as its makers do, or diffusers, as ZImageControlNetPipeline does."""
    cache_dir: str | None = field(default=None, metadata=HARMLESS)
    """Where downloads live; exported as MODELSCOPE_CACHE and HF_HOME. null keeps the hubs' own defaults."""
    offline: bool = field(default=False, metadata=HARMLESS)
    """Never touch the network; say what is missing instead."""
    dtype: Dtype = Dtype.auto
    verify: Verify = Verify.first_use
    """Checks of the weights before loading: headers, first_use or always."""
    prepare: Prepare = Prepare.auto
    """Whether a faster-loading copy of the weights is made in the runner's cache: auto, always or never."""
    native_sizes: list[int] = field(default_factory=list)
    """Sides in pixels the model can draw; empty means any multiple of 16."""
    recommended: dict[str, Any] = field(default_factory=dict)
    """Every field of ``sampling``, as the model's makers advise."""

    def __post_init__(self) -> None:
        if self.dtype is Dtype.float16:
            raise UserError(
                "model.dtype=float16 overflows with Z-Image and gives black or broken pictures: "
                "use bfloat16 (same size) or float32"
            )
        if self.source is Source.local and names_a_file(self.path):
            raise UserError(
                f"model.path={self.path} is a file, and model=local is for directories: "
                f"write model=file model.path={self.path} model.variant=turbo (or base)"
            )
        if self.path is None and self.source is Source.local:
            raise UserError("model.path is not set: model=local needs model.path=DIRECTORY (diffusers format)")
        if self.path is None and self.source in (Source.modelscope, Source.huggingface) and not self.repo:
            raise UserError(f"model.repo is not set: model.source={self.source.value} needs model.repo=OWNER/NAME")

    @property
    def parts(self) -> dict[str, str]:
        """The parts that are put in the place of the checkpoint's own: name -> path."""
        return {name: path for name in PARTS if (path := getattr(self, name)) is not None}

    @property
    def places(self) -> dict[str, str]:
        """Names, without their folders, of the files and directories that ``path`` and the parts name."""
        path = {"path": self.path} if self.path is not None else {}
        return {field: Path(place).name for field, place in (path | self.parts).items()}

    @property
    def is_assembled(self) -> bool:
        """Whether its parts come from several places: a file holds no tokenizer and no scheduler."""
        return bool(self.parts) or names_a_file(self.path)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for a size this model cannot draw."""
        if self.native_sizes and (height != width or height not in self.native_sizes):
            sizes = " or ".join(f"{s}x{s}" for s in self.native_sizes)
            raise UserError(
                f"sampling.width={width} sampling.height={height}: {self.name} can only draw {sizes} pictures; "
                f"set sampling.height and sampling.width to {self.native_sizes[0]}, or choose another model"
            )


PUBLISHED = {
    Variant.turbo: ("Tongyi-MAI/Z-Image-Turbo", {"num_inference_steps": 8, "guidance_scale": 0.0}),
    Variant.base: ("Tongyi-MAI/Z-Image", {"num_inference_steps": 50, "guidance_scale": 4.0}),
}
"""Of each variant, the repository that completes a file and what its makers recommend: as in conf/model/."""


@dataclass(kw_only=True, slots=True)
class FileModel(Model):
    """A checkpoint in one file, or in one file for each part, of whatever layout; the published one completes it."""

    variant: Variant | None = None
    """turbo or base: steps, guidance and the scheduler's shift follow. No file says which it is."""

    def __post_init__(self) -> None:
        file = self.path or self.transformer
        if file is None:
            raise UserError(
                "model.path is not set: model=file needs model.path=FILE (.safetensors or .gguf), or model.transformer"
            )
        if self.path is not None and Path(self.path).expanduser().is_dir():
            raise UserError(f"model.path={self.path} is a directory: write model=local model.path={self.path}")
        if self.variant is None:
            raise UserError(
                "model.variant is not set: a file does not say whether it is of Z-Image-Turbo or of Z-Image (base): "
                "add model.variant=turbo (8 steps, no guidance) or model.variant=base (28 to 50 steps with guidance)"
            )
        repo, recommended = PUBLISHED[self.variant]
        if self.source in (Source.modelscope, Source.huggingface):
            self.repo = self.repo or repo
        self.recommended = recommended | self.recommended
        Model.__post_init__(self)
