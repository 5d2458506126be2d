"""The loaded model and its three calls: encode, denoise, decode. Knows nothing of configs, files written or runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from zimage_runner.engines.base import PendingImages
from zimage_runner.engines.caption_features import REFINED
from zimage_runner.engines.native.controlnet import ControlModulation, ControlNet, Steering
from zimage_runner.engines.native.graphs import GraphCache
from zimage_runner.engines.native.images import HostCopy, Ready, page_locked
from zimage_runner.engines.native.kernels import choose_operations
from zimage_runner.engines.native.quantised import FORMATS
from zimage_runner.engines.native.rehearsal import Rehearsals, advance
from zimage_runner.engines.native.rope import (
    RotaryTable,
    caption_positions,
    check_axes,
    move_table,
    padded_length,
    rotary_table,
    sequence_tables,
)
from zimage_runner.engines.native.sampler import Guidance, Kept, Schedule, Start, euler, make_schedule
from zimage_runner.engines.native.sdpa import choose_attention
from zimage_runner.engines.native.streamed_encoder import StreamedTextEncoder
from zimage_runner.engines.native.text_encoder import TextEncoder
from zimage_runner.engines.native.tiles import in_tiles
from zimage_runner.engines.native.token_table import TokenTable
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.engines.native.transformer import Arithmetic, StepModulation, Transformer, embed_times
from zimage_runner.engines.native.vae_decoder import VaeDecoder
from zimage_runner.engines.native.vae_encoder import VaeEncoder
from zimage_runner.engines.request import Posterior
from zimage_runner.model import PATCH, Convention

if TYPE_CHECKING:
    from zimage_runner.engines.native.assembly import Description

Tensors = Mapping[str, torch.Tensor]
LoadedTensors = Callable[[str], Tensors | None]

Steered = tuple[Steering, ControlModulation]
"""What a step is steered by."""

CACHED_SHAPES = 32
CACHED_SCHEDULES = 8
RECORDED_TOKENS = 2048
"""Most tokens of a batch whose forward is recorded as a CUDA graph. Beyond it launches hide behind the work: recording
gained 3 % at 1056 tokens and nothing at 4128, where it would hold half a gigabyte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run, as opposed to what."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    fused_kernels: bool = True
    """Triton's fused operations, where there are a GPU and Triton."""
    cuda_graphs: int = 0
    """Most shapes recorded as CUDA graphs at a time."""
    precision: str = "bf16"
    """Of the factors of the transformer blocks' products: bf16 (whatever ``dtype`` is), fp8 or int8."""
    bf16_layers: frozenset[int] = frozenset()
    """Main blocks that multiply in ``dtype`` whatever the precision."""
    convention: Convention = Convention.trained
    """How a ControlNet is used."""
    streamed: bool = False
    """Weights of the text encoder and of the transformer's blocks come to the device just before they are used."""
    rehearse_decoder: bool = False
    """Run the decoder's layers for a new size while the GPU is busy with the forwards before. For a GPU that holds the
    decoder and a forward's memory at the same time."""

    @property
    def arithmetic(self) -> Arithmetic:
        """The transformer's."""
        return Arithmetic(self.dtype, FORMATS.get(self.precision), self.bf16_layers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Control:
    """What a ControlNet steers a batch by, and in which steps."""

    condition: torch.Tensor
    """[batch, channels, height / 8, width / 8]: latents of the control pictures, and the other channels (see
    ``controlnet.condition_of``), as many as the ControlNet takes."""
    scales: Sequence[float]
    """One a picture: what hints are multiplied by."""
    start: float = 0.0
    end: float = 1.0
    """Shares of all steps: those that begin before ``start`` or end behind ``end`` are not steered."""

    def active(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 0, is steered."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


class NativeModel:
    """Text encoder, transformer and decoder, as far as they are loaded, and what of their work can be reused.

    The networks are attributes to be set (see assembly.py) and deleted: not all need be in memory at a time.
    """

    token_table: TokenTable
    text_encoder: TextEncoder | StreamedTextEncoder
    transformer: Transformer
    controlnet: ControlNet
    vae: VaeDecoder
    vae_encoder: VaeEncoder
    """Of pictures that items start from; there once one does."""

    def __init__(self, description: Description, tokenizer: CaptionTokenizer, options: Options) -> None:
        self.description = description
        self.tokenizer = tokenizer
        self.options = options
        self.shift = description.shift
        self.device = torch.device(options.device)
        self.ops = choose_operations(options.device, options.fused_kernels)
        head_dim = description.transformer.head_dim
        self.attention = choose_attention(options.attention, options.device, options.dtype, head_dim)
        self.graphs = GraphCache(options.cuda_graphs if self.device.type == "cuda" else 0)
        self._captions = WeakIdKeyDictionary()
        self._rehearsals = Rehearsals(options.rehearse_decoder, self._to_host)
        self._copy_stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._tables = lru_cache(CACHED_SHAPES)(self._make_tables)
        self._steps = lru_cache(CACHED_SCHEDULES)(self._make_steps)
        self._control_steps = lru_cache(CACHED_SCHEDULES)(self._make_control_steps)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        """Caption features [tokens, cap_feat_dim] of each text.

        One text a call of the network: the products' rounding depends on the batch, and a caption's features must
        not depend on its neighbours. Equal texts share one tensor.
        """
        unique = list(dict.fromkeys(texts))
        captions = self.tokenizer(unique, max_sequence_length)
        if isinstance(self.text_encoder, StreamedTextEncoder):
            features = dict(zip(unique, self.text_encoder.encode(captions, self.token_table, self.ops)))
            return [features[text] for text in texts]
        features = {}
        for text, ids in zip(unique, captions):
            turns = self.text_encoder.rotary(len(ids))
            vectors = self._to_device(self.token_table.vectors(ids)[None])
            features[text] = self.text_encoder(vectors, self._to_device(turns), self.ops)[0]
        return [features[text] for text in texts]

    @torch.inference_mode()
    def encode_picture(self, pixels: torch.Tensor) -> Posterior:
        """Latents' distribution of uint8 pixels [height, width, 3], sides multiples of 16."""
        return self.vae_encoder.forward(pixels)

    @torch.inference_mode()
    def denoise(
        self,
        prompt_embeds: Sequence[torch.Tensor],
        noise: torch.Tensor,
        num_inference_steps: int,
        guidance: Guidance | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        start: Start | None = None,
        control: Control | None = None,
    ) -> torch.Tensor:
        """Latents [batch, channels, height / 8, width / 8] float32 after all steps, on the model's device.

        prompt_embeds and negative_prompt_embeds: one [tokens, cap_feat_dim] per picture, as ``encode`` gives them;
        noise float32, standard normal. ``start``: the latents that are drawn from, and what is kept of them. Raises
        ValueError for shapes beyond the model's positions.
        """
        guidance = guidance or Guidance()
        taken = (num_inference_steps, *((start.strength, start.exact) if start else ()))
        schedule, steps = self._steps(*taken)
        captions = [self._caption(embeds) for embeds in prompt_embeds]
        negatives = [self._caption(embeds) for embeds in negative_prompt_embeds or ()]
        if guidance.scale > 0 and len(negatives) != len(captions):
            raise ValueError("guidance_scale > 0 needs negative_prompt_embeds, one per picture")
        groups = {False: group_captions(captions), True: group_captions(captions + negatives)}
        # Forwards that are worth recording are so short that they leave the host no time.
        spare_time = noise[:, 0].numel() // PATCH**2 > RECORDED_TOKENS and hasattr(self, "vae")
        rehearsal = self._rehearsals.begin(noise, self.vae) if spare_time else iter(())
        steered = self._steering(control, *taken)

        def predict(step: int, latents: torch.Tensor, guided: bool) -> torch.Tensor:
            if guided:
                latents = latents.repeat(2, 1, 1, 1)
            steering = steered(step)
            begins = step == 0 or (steering is None) != (steered(step - 1) is None)

            def velocity_of(part: torch.Tensor, first: bool) -> torch.Tensor:
                part, own = self._part_steering(part, steering)
                return self._velocity(part, groups[guided], steps[step], own, first and begins)

            tile = start.tile if start else 0
            beside = None if control is None or steering is None or not tile else self._to_device(control.condition)
            velocity = in_tiles(velocity_of, latents, tile, beside)
            advance(rehearsal, step, len(steps))
            return velocity

        noise = self._to_device(noise.float())
        latents, keep = noise, None
        if start is not None:
            mask = None if start.mask is None else self._to_device(start.mask)
            keep = Kept(self._to_device(start.latents.float()), noise, mask)
            latents = keep.at(schedule.sigmas[0].item())
        with self.attention.context():
            return euler(latents, schedule, guidance, predict, keep if keep and keep.mask is not None else None)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, float32: bool = False) -> PendingImages:
        """Pictures of the latents, on their way to the host: ``wait()`` gives uint8 [batch, height, width, 3].

        Decoded one by one: a picture fills the device, and more at a time would only take more memory.
        ``float32`` decodes in that precision, several times slower.
        """
        latents = latents.to(self.device, torch.float32)
        vae = self._float32_vae() if float32 else self.vae
        self._rehearsals.decoded(latents)
        return self._to_host([vae(one) for one in latents.split(1)])

    def _to_host(self, decoded: list[torch.Tensor]) -> PendingImages:
        pixels = torch.cat(decoded)
        return Ready(pixels) if self._copy_stream is None else HostCopy(pixels, self._copy_stream)

    def forget(self) -> None:
        """Drop recordings and what was computed from the weights; needed before a network is replaced or freed."""
        self.graphs.clear()
        self._captions.clear()
        self._tables.cache_clear()
        self._steps.cache_clear()
        self._control_steps.cache_clear()

    def weights_changed(self) -> None:
        """Drop what was computed from the transformer's weights, which were overwritten where they are."""
        self._captions.clear()
        self._steps.cache_clear()
        self._control_steps.cache_clear()

    def _float32_vae(self) -> VaeDecoder:
        with torch.device("meta"):
            vae = VaeDecoder(self.description.vae, self.ops)
        vae.load_state_dict({name: tensor.float() for name, tensor in self.vae.state_dict().items()}, assign=True)
        return vae

    def _steering(self, control: Control | None, *taken: Any) -> Callable[[int], Steered | None]:
        """What gives a step what steers it; ``taken``: as ``_make_steps`` takes them."""
        if control is None or not any(control.scales):
            return lambda step: None
        tokens = self.controlnet.embed(self._to_device(control.condition), self.transformer)
        scale = self._to_device(torch.tensor(list(control.scales), dtype=torch.float32))[:, None, None]
        own, steering = self._control_steps(*taken), Steering(tokens, scale)
        return lambda step: (steering, own[step]) if control.active(step, len(own)) else None

    def _part_steering(self, part: torch.Tensor, whole: Steered | None) -> tuple[torch.Tensor, Steered | None]:
        """A tile's latents, and what steers it: the condition that lies behind them, where it does."""
        channels = self.description.transformer.in_channels
        latents, condition = part[:, :channels], part[:, channels:]
        if whole is None or not condition.shape[1]:
            return part, whole
        steering, own = whole
        tokens = self.controlnet.embed(condition[: len(steering.scale)], self.transformer)
        return latents.contiguous(), (Steering(tokens, steering.scale), own)

    def _velocity(
        self,
        latents: torch.Tensor,
        groups: list[tuple[list[int], torch.Tensor]],
        step: StepModulation,
        steered: Steered | None,
        first: bool,
    ) -> torch.Tensor:
        if len(groups) == 1:
            return self._forward(latents, groups[0][1], step, _rows_of(steered, groups[0][0]), first)
        # Captions of different padded lengths, as under guidance: one forward each length, no mask.
        velocity: dict[int, torch.Tensor] = {}
        for rows, caption in groups:
            some = torch.stack([latents[row] for row in rows])
            velocity.update(zip(rows, self._forward(some, caption, step, _rows_of(steered, rows), first).clone()))
        return torch.stack([velocity[row] for row in range(len(latents))])

    def _forward(
        self, latents: torch.Tensor, caption: torch.Tensor, step: StepModulation, steered: Steered | None, first: bool
    ) -> torch.Tensor:
        key = (tuple(latents.shape), caption.shape[1], *(() if steered is None else ("steered",)))
        tables = self._tables(latents.shape[2] // PATCH, latents.shape[3] // PATCH, caption.shape[1])
        vectors = step.tensors()

        def forward(latents: torch.Tensor, caption: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            modulation = StepModulation(*others[: len(vectors)])
            if steered is None:
                return self.transformer(latents, caption, modulation, *tables)
            tokens, scale, *own = others[len(vectors) :]
            steering = Steering(tokens, scale)
            return self.controlnet(
                self.transformer, latents, caption, modulation, *tables, steering, ControlModulation(*own)
            )

        inputs = (latents, caption, *vectors, *(() if steered is None else (*steered[0], *steered[1].tensors())))
        if len(latents) * len(tables[1].cos) > RECORDED_TOKENS or self.options.streamed:
            return forward(*inputs)
        return self.graphs.call(key, forward, inputs, first)

    def _caption(self, embeds: torch.Tensor) -> torch.Tensor:
        """Refined caption [padded tokens, dim]; remembered for a time, no longer than ``embeds`` itself lives."""
        refined = self._captions.get(embeds)
        if refined is None:
            if len(self._captions) >= REFINED:
                self._captions.clear()
            self._captions[embeds] = refined = self._refine(embeds)
        return refined

    def _refine(self, embeds: torch.Tensor) -> torch.Tensor:
        config, dtype = self.description.transformer, self.options.dtype
        tokens, length = len(embeds), padded_length(len(embeds))
        check_axes(1, 1, length, config.axes_lens)
        features = torch.zeros(1, length, config.cap_feat_dim, device=self.device, dtype=dtype)
        features[0, :tokens] = self._to_device(embeds) if embeds.device.type == "cpu" else embeds
        rope = move_table(rotary_table(caption_positions(length), config.axes_dims, config.rope_theta), self._to_device)
        with self.attention.context():
            return self.transformer.embed_caption(features, tokens, rope)[0]

    def _make_tables(self, rows: int, columns: int, caption_length: int) -> tuple[RotaryTable, RotaryTable]:
        config = self.description.transformer
        check_axes(rows, columns, caption_length, config.axes_lens)
        return sequence_tables(rows, columns, caption_length, config.axes_dims, config.rope_theta, self._to_device)

    def _make_steps(
        self, num_inference_steps: int, strength: float = 1.0, exact: bool = False
    ) -> tuple[Schedule, list[StepModulation]]:
        schedule = make_schedule(num_inference_steps, self.shift, strength, exact)
        embedded_times = embed_times(schedule.times, self.description.transformer.t_scale)
        return schedule, self.transformer.modulation(self._to_device(embedded_times))

    def _make_control_steps(self, *taken: Any) -> list[ControlModulation]:
        times = embed_times(self._steps(*taken)[0].times, self.description.transformer.t_scale)
        return self.controlnet.modulation(self.transformer.adaLN_input(self._to_device(times)))

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        # From pageable memory the copy would wait for all work that is queued on the GPU.
        if self.device.type == "cpu":
            return x
        return page_locked(x.shape, x.dtype).copy_(x).to(self.device, non_blocking=True)


def _rows_of(steered: Steered | None, rows: Sequence[int]) -> Steered | None:
    """What steers some rows of a batch, which under guidance is there twice."""
    if steered is None:
        return None
    steering, own = steered
    count = len(steering.tokens)
    return (steering if list(rows) == list(range(count)) else steering.of([row % count for row in rows])), own


def group_captions(captions: Sequence[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    """Rows of equal padded length together: (row numbers, [rows, tokens, dim]) for each length."""
    rows: dict[int, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(len(caption), []).append(row)
    return [(group, torch.stack([captions[row] for row in group])) for group in rows.values()]
