"""What an engine is asked: whether it can do a run (Needs), to load (LoadRequest), to draw (DenoiseRequest).

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, Self

from zimage_runner.sampling import SamplingParams

if TYPE_CHECKING:
    import torch

    from zimage_runner.compile import Compile
    from zimage_runner.memory.policies import Memory
    from zimage_runner.model import Model
    from zimage_runner.weights.find.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a run asks of its engine; ``EngineConfig.check`` says whether it can do that."""

    model: Model
    memory: Memory
    """Where the weights are to be."""
    compile: Compile
    guided: bool = False
    """Whether a picture is drawn with classifier-free guidance."""
    adapted: bool = False
    """Whether a picture is drawn with adapters."""
    encoder_adapted: bool = False
    """Whether an adapter changes the text encoder."""
    sizes: frozenset[tuple[int, int]] = frozenset()
    """Height and width of the pictures in pixels; empty where they are not known."""

    @classmethod
    def of(cls, model: Model, memory: Memory, compile: Compile, drawn: Iterable[SamplingParams]) -> Self:
        """Return the needs of a run that draws pictures of these sampling parameters."""
        params = set(drawn)
        return cls(
            model=model,
            memory=memory,
            compile=compile,
            guided=any(one.uses_guidance for one in params),
            adapted=any(one.loras for one in params),
            encoder_adapted=any(one.encoder_loras for one in params),
            sizes=frozenset((one.height, one.width) for one in params),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest(Needs):
    """What an engine is to load, and what it will be used for."""

    checkpoint: Checkpoint
    encodes: bool = True
    """False when every caption's features are expected to be there already: the text encoder need not be loaded before
    ``Engine.encode`` is called, if it is."""

    @classmethod
    def for_needs(cls, needs: Needs, *, checkpoint: Checkpoint, encodes: bool = True) -> Self:
        """Return the request to load ``checkpoint`` for a run with these needs."""
        values = {one.name: getattr(needs, one.name) for one in fields(Needs)}
        return cls(**values, checkpoint=checkpoint, encodes=encodes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenoiseRequest:
    """One batch of pictures of the same shape and the same padded caption length. Made by ``denoise_request``."""

    prompt_embeds: Sequence[torch.Tensor]
    """B tensors [L_i, cap_feat_dim] without padding rows."""
    negative_prompt_embeds: Sequence[torch.Tensor] | None
    """B tensors as above when ``params.uses_guidance``, else None."""
    noise: torch.Tensor
    """[B, latent_channels, height/8, width/8], float32, drawn per item."""
    params: SamplingParams
    """height, width, num_inference_steps (= transformer forwards), guidance_scale, cfg_*."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupShape:
    """A batch shape that the plan contains."""

    params: SamplingParams
    caption_tokens: int = 0
    """Padded caption length to warm; 0 takes the warm-up prompt's own."""
    negative_caption_tokens: int = 0
    batch_size: int = 1
    whole: bool = True
    """Draw a picture to the end; off: a single step, for a caption length of a size that another shape draws."""

    @property
    def label(self) -> str:
        """What a pass is called in the report: 1024x1024, 1024x1024 b4, 1024x1024 c64."""
        batch = f" b{self.batch_size}" if self.batch_size > 1 else ""
        caption = f" c{self.caption_tokens}" if self.caption_tokens else ""
        return f"{self.params.width}x{self.params.height}{batch}{caption}"


class Latents(Protocol):
    """What is needed of an engine to make a request for it."""

    latent_channels: int
    vae_scale_factor: int


def denoise_request(
    engine: Latents,
    params: SamplingParams,
    captions: Sequence[torch.Tensor],
    negatives: Sequence[torch.Tensor] | None,
    seeds: Sequence[int],
    *,
    noise_device: str = "cpu",
) -> DenoiseRequest:
    """Return the request for one batch: item i has captions[i], negatives[i] (with guidance) and seeds[i]."""
    scale = engine.vae_scale_factor
    sides = params.height // scale, params.width // scale
    return DenoiseRequest(
        prompt_embeds=captions,
        negative_prompt_embeds=negatives,
        noise=draw_noise(seeds, engine.latent_channels, *sides, device=noise_device),
        params=params,
    )


def draw_noise(seeds: Sequence[int], channels: int, height: int, width: int, device: str = "cpu") -> torch.Tensor:
    """Return standard normal noise [len(seeds), channels, height, width], float32 on the CPU, a generator per seed.

    So a picture does not depend on its batch. height and width are latent sizes. ``device`` is where the numbers are
    drawn: the CPU's sequence is the same on every machine, a GPU's (Philox) is the same among CUDA devices alone.
    """
    import torch

    shape = (channels, height, width)
    rows = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows).cpu()
