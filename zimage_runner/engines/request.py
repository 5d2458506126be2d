"""What an engine is asked: whether it can do a run (Needs), to load (LoadRequest), to draw (DenoiseRequest).

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

from zimage_runner.sampling import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import torch

    from zimage_runner.compile import Compile
    from zimage_runner.memory.policies import Memory
    from zimage_runner.model import Model
    from zimage_runner.pictures.placed import Placed
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
    pictured: bool = False
    """Whether a picture starts from another one (img2img, inpainting)."""
    controlled: bool = False
    """Whether a picture follows another one, with a ControlNet."""
    sizes: frozenset[tuple[int, int]] = frozenset()
    """Height and width of the pictures in pixels; empty where they are not known."""

    @classmethod
    def like(cls, other: Needs, **changes: Any) -> Needs:
        """Return those of a request, but for ``changes``."""
        return Needs(**{one.name: getattr(other, one.name) for one in fields(Needs)} | changes)

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
            pictured=any(one.inputs is not None and one.inputs.image is not None for one in params),
            controlled=any(one.inputs is not None and one.inputs.control_image is not None for one in params),
            sizes=frozenset((one.height, one.width) for one in params),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest(Needs):
    """What an engine is to load, and what it will be used for."""

    checkpoint: Checkpoint
    encodes: bool = True
    """False when every caption's features are expected to be there already: the text encoder need not be loaded before
    ``Engine.encode`` is called, if it is."""
    shapes: Sequence[WarmupShape] = ()
    """Of the batches that are planned; empty where they are not known."""
    captions: int = 0
    """How many are planned; 0 where they are not known before the model is loaded, as in a service."""

    @classmethod
    def for_needs(cls, needs: Needs, **others: Any) -> Self:
        """Return the request to load a checkpoint for a run with these needs; ``others``: the fields of this class."""
        return cls(**{one.name: getattr(needs, one.name) for one in fields(Needs)} | others)


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
    """height, width, num_inference_steps (= transformer forwards), guidance_scale, cfg_*, strength in ``inputs``."""
    placed: Sequence[Placed] | None = None
    """The pictures of each item at the drawn size, where the items have any."""
    start: torch.Tensor | None = None
    """Latents of ``noise``'s shape, float32, drawn from the posterior per item; None: starts from noise."""
    mask: torch.Tensor | None = None
    """[B, 1, height/8, width/8] float32, 1 where it is painted anew; None: everywhere."""
    control: ControlLatents | None = None
    """What a ControlNet follows; None: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ControlLatents:
    """Control pictures of a batch, encoded: the modes of their distributions, float32 on the CPU."""

    pictures: torch.Tensor
    """[B, latent_channels, height/8, width/8]."""
    scales: Sequence[float]
    """How strongly each item follows its own."""
    around: torch.Tensor | None = None
    """As ``pictures``: the picture that each item starts from, with grey where it is painted; None: no mask."""
    kept: torch.Tensor | None = None
    """[B, 1, height/8, width/8]: 1 where that stays, 0 where it is painted; None: no mask."""

    @classmethod
    def of(cls, placed: Sequence[Placed], posterior: Callable[[np.ndarray], Posterior], scale: int) -> Self | None:
        """Return those of a batch, whose items all have one or none; ``posterior`` encodes pixels."""
        controls = [one.control for one in placed if one.control is not None]
        if not controls:
            return None
        arounds = [one.around for one in placed if one.around is not None]
        masks = [one.mask for one in placed if one.mask is not None]
        return cls(
            pictures=torch_stack(posterior(control).mean for control in controls),
            scales=[one.control_scale for one in placed],
            around=torch_stack(posterior(around).mean for around in arounds) if arounds else None,
            kept=torch_stack(_kept(mask, scale) for mask in masks) if arounds else None,
        )


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
        """What a pass is called in the report: 1024x1024, 1024x1024 b4, 1024x1024 c64, 1024x1024 c64 control."""
        batch = f" b{self.batch_size}" if self.batch_size > 1 else ""
        caption = f" c{self.caption_tokens}" if self.caption_tokens else ""
        image, mask, control, _ = self.params.kind or (False, False, False, 0)
        kinds = [name for name, there in (("image", image), ("mask", mask), ("control", control)) if there]
        return " ".join([f"{self.params.width}x{self.params.height}{batch}{caption}", *kinds])


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
    placed: Sequence[Placed] | None = None,
    posterior: Callable[[np.ndarray], Posterior] | None = None,
) -> DenoiseRequest:
    """Return the request for one batch: item i has captions[i], negatives[i] (with guidance), seeds[i] and placed[i].

    ``posterior`` encodes the pixels that items start from.
    """
    scale = engine.vae_scale_factor
    sides = params.height // scale, params.width // scale
    starts = [one.pixels for one in placed or () if one.pixels is not None]
    # The first draw is for the latents of the picture that an item starts from, as in diffusers' img2img pipeline.
    draws = draw_noises(2 if starts else 1, seeds, engine.latent_channels, *sides, noise_device)
    if placed and any(one.noise_from is not None for one in placed):
        others = [seed if one.noise_from is None else one.noise_from for seed, one in zip(seeds, placed, strict=True)]
        there = draw_noises(len(draws), others, engine.latent_channels, *sides, noise_device)
        draws = mixed_noise(there, draws, [one.noise_share for one in placed])
    start = None
    if starts:
        assert posterior is not None
        start = torch_stack(posterior(pixels).sample(draw) for pixels, draw in zip(starts, draws[0], strict=True))
    masks = [one.mask for one in placed or () if one.mask is not None]
    return DenoiseRequest(
        prompt_embeds=captions,
        negative_prompt_embeds=negatives,
        noise=draws[-1],
        params=params,
        placed=placed,
        start=start,
        mask=torch_stack(latent_mask(mask, scale) for mask in masks) if masks else None,
        control=ControlLatents.of(placed or (), posterior, scale) if posterior else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What the autoencoder says of a picture: a normal distribution of latents, scaled as the transformer's are.

    Both [channels, height/8, width/8], float32 on the CPU.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, draw: torch.Tensor) -> torch.Tensor:
        """The latents for a standard normal draw of the same shape."""
        return self.mean + self.std * draw


def latent_mask(mask: np.ndarray, scale: int) -> torch.Tensor:
    """float32 [1, height/scale, width/scale]: the largest share within each latent position's pixels.

    So all that is painted is drawn anew, also where a position holds what is kept, which is put back afterwards.
    """
    import torch

    return torch.nn.functional.max_pool2d(torch.from_numpy(mask.copy())[None], scale)


def _kept(mask: np.ndarray, scale: int) -> torch.Tensor:
    """float32 [1, height/scale, width/scale]: 1 where the pixel that begins a latent position stays.

    The nearest one, as in diffusers' ZImageControlNetInpaintPipeline and in VideoX-Fun.
    """
    import torch

    return (torch.from_numpy(mask[::scale, ::scale].copy()) < 0.5).float()[None]


def torch_stack(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """torch.stack of whatever yields tensors, for modules that import torch late."""
    import torch

    return torch.stack(list(rows))


def mixed_noise(first: torch.Tensor, second: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Standard normal noise between two, [..., batch, channels, height, width]: a share of 0 is ``first``.

    On the arc, cos and sin of share * 90 degrees: the variance stays 1, as the two are independent.
    """
    import torch

    angles = torch.tensor(shares, dtype=torch.float64) * (torch.pi / 2)
    near, far = (part.float()[:, None, None, None] for part in (angles.cos(), angles.sin()))
    mixed = near * first + far * second
    whole = torch.tensor([share == 1 for share in shares])[:, None, None, None]
    return torch.where(whole, second, mixed)


def draw_noises(
    count: int, seeds: Sequence[int], channels: int, height: int, width: int, device: str = "cpu"
) -> torch.Tensor:
    """Return standard normal noise [count, len(seeds), channels, height, width], float32 on the CPU.

    Each seed has a generator, so a picture does not depend on its batch; its ``count`` draws follow one another.
    height and width are latent sizes. ``device`` is where the numbers are drawn: the CPU's sequence is the same on
    every machine, a GPU's (Philox) is the same among CUDA devices alone.
    """
    import torch

    shape, rows = (channels, height, width), []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed)
        rows.append(torch.stack([torch.randn(shape, generator=generator, device=device) for _ in range(count)]))
    return torch.stack(rows, dim=1).cpu()
