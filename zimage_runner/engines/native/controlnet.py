"""A ControlNet of Z-Image: copies of the transformer's blocks that see a condition and steer the transformer by hints.

Arithmetic follows diffusers' ZImageControlNetModel, or VideoX-Fun's ZImageControlTransformer2DModel, which published
files were trained with: the two differ in what the noise refiner's hints reach (see ``Convention``). Each control
block is computed just before its hint is added, so that no hints are kept; the transformer's own blocks compute what
they always do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.layers import Linear
from zimage_runner.engines.native.rope import RotaryTable
from zimage_runner.engines.native.sdpa import Attend, AttendFp8
from zimage_runner.engines.native.streaming import BlockStream
from zimage_runner.engines.native.transformer import (
    PLAIN,
    Arithmetic,
    Block,
    BlockModulation,
    Hints,
    StepModulation,
    Transformer,
    TransformerConfig,
    attention_scales,
    block_modulation,
    blocks_of,
    embed_patches,
    modulation_of,
    present,
)
from zimage_runner.engines.request import ControlLatents
from zimage_runner.model import PATCH, Convention
from zimage_runner.weights.formats.controlnet import ControlLayout, Refiner


class ControlBlock(Block):
    """A transformer block with a projection of what it gives, and before the first one of a row, of the condition."""

    def __init__(self, config: TransformerConfig, arithmetic: Arithmetic, first: bool) -> None:
        super().__init__(config, True, arithmetic)
        self.before_proj = Linear(config.dim, config.dim) if first else None
        self.after_proj = Linear(config.dim, config.dim)


class ControlModulation(NamedTuple):
    """One step's vectors: blocks [refiner + control layers, 4, dim] float32; attention_input: see BlockModulation."""

    blocks: torch.Tensor
    attention_input: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those there are: ``ControlModulation(*step.tensors())`` is the step again."""
        return [tensor for tensor in self if tensor is not None]

    def vectors(self) -> list[BlockModulation]:
        """Each block's."""
        return [block_modulation(self.blocks, self.attention_input, index) for index in range(len(self.blocks))]


class Steering(NamedTuple):
    """What a batch is steered by."""

    tokens: torch.Tensor
    """[batch, image tokens, dim]: the embedded condition (see ``ControlNet.embed``)."""
    scale: torch.Tensor
    """[batch, 1, 1] float32: what hints are multiplied by."""

    def of(self, rows: Sequence[int]) -> Steering:
        """Some pictures' own, in this order; rows may come twice."""
        index = torch.tensor(rows, device=self.tokens.device)
        return Steering(self.tokens[index], self.scale[index])


class ControlNet(nn.Module):
    """The modules of one file, and the forward of a transformer that it steers."""

    def __init__(
        self,
        layout: ControlLayout,
        config: TransformerConfig,
        ops: Operations,
        attend: Attend,
        arithmetic: Arithmetic = PLAIN,
        attend_fp8: AttendFp8 | None = None,
        convention: Convention = Convention.trained,
    ) -> None:
        """``config``: the transformer's; ``attend_fp8``: attention of all its blocks, instead of ``attend``."""
        super().__init__()
        self.layout, self.config, self.convention = layout, config, convention
        self.ops, self.attend, self.attend_fp8 = ops, attend, attend_fp8
        self.dtype = arithmetic.dtype
        self.stream: BlockStream | None = None
        self.control_embedder = Linear(PATCH * PATCH * layout.channels, config.dim)
        refiner: list[Block] = []
        if layout.refiner is Refiner.plain:
            refiner = [Block(config, True, arithmetic) for _ in range(config.n_refiner_layers)]
        elif layout.refiner is Refiner.own:
            refiner = [ControlBlock(config, arithmetic, i == 0) for i in range(len(layout.refiner_places))]
        self.control_noise_refiner = nn.ModuleList(refiner)
        self.control_layers = nn.ModuleList(ControlBlock(config, arithmetic, i == 0) for i in range(len(layout.places)))

    @property
    def blocks(self) -> list[Block]:
        """In the order in which they are used."""
        return blocks_of(self.control_noise_refiner) + blocks_of(self.control_layers)

    def stream_blocks(self, device: torch.device) -> Callable[[nn.Module, str, torch.Tensor], torch.Tensor]:
        """Have the large weights in host memory, as ``Transformer.stream_blocks`` does, in a row of their own."""
        self.stream = BlockStream([*self.blocks], device, self.dtype)
        return self.stream.place

    def modulation(self, adaln_input: torch.Tensor) -> list[ControlModulation]:
        """What each step's time does to the blocks; adaln_input as ``Transformer.adaLN_input`` gives it."""
        factors = modulation_of(self.blocks, adaln_input, self.ops)
        if self.attend_fp8 is None:
            return [ControlModulation(step) for step in factors.unbind(1)]
        scales = attention_scales(self.blocks, factors)
        return [ControlModulation(*step) for step in zip(factors.unbind(1), scales.unbind(1))]

    def embed(self, condition: torch.Tensor, transformer: Transformer) -> torch.Tensor:
        """A condition [batch, channels, height, width] as tokens; the same for every step and seed."""
        return embed_patches(condition, self.control_embedder, transformer.x_pad_token)

    def forward(
        self,
        transformer: Transformer,
        latents: torch.Tensor,
        caption: torch.Tensor,
        modulation: StepModulation,
        image_rope: RotaryTable,
        unified_rope: RotaryTable,
        steering: Steering,
        own: ControlModulation,
    ) -> torch.Tensor:
        """The transformer's velocity, steered; the other arguments are its own ``forward``'s."""
        height, width = latents.shape[-2:]
        refiners = len(transformer.noise_refiner)
        steps = [modulation.block(i) for i in range(refiners + len(transformer.layers))]
        vectors, count = own.vectors(), len(self.control_noise_refiner)
        x = transformer.embed_image(latents)
        condition, hints = self._refine(steering, x, vectors, image_rope)

        def refine(x: torch.Tensor, hints: Hints | None) -> torch.Tensor:
            return transformer.run(transformer.noise_refiner, x, steps[:refiners], image_rope, None, 0, hints)

        seen = None
        if hints is not None and self.convention is Convention.diffusers:
            seen, hints = refine(x.clone(), hints), None
        x = torch.cat([refine(x, hints), caption], dim=1)
        seen = x if seen is None else torch.cat([seen, caption], dim=1)
        row = _Row(self, blocks_of(self.control_layers), vectors[count:], unified_rope, count)
        row.begin(torch.cat([condition, caption], dim=1), seen)
        first = [row.hint()]  # now: the transformer's first layer may overwrite what it is made of
        make = lambda: first.pop() if first else row.hint()  # noqa: E731
        hints = Hints(frozenset(self.layout.places), make, steering.scale)
        tokens = height * width // PATCH**2
        x = transformer.run(transformer.layers, x, steps[refiners:], unified_rope, tokens, refiners, hints)
        return transformer.unembed(x, modulation.final, height, width)

    def _refine(
        self, steering: Steering, x: torch.Tensor, vectors: list[BlockModulation], rope: RotaryTable
    ) -> tuple[torch.Tensor, Hints | None]:
        """The condition as the control layers take it, and the noise refiner's hints, where there are any.

        x: the embedded latents, which the refiner's blocks see unless they are plain.
        """
        refiner = self.layout.refiner
        blocks = blocks_of(self.control_layers if refiner is Refiner.shared else self.control_noise_refiner)
        begin = len(self.control_noise_refiner) if refiner is Refiner.shared else 0
        row = _Row(self, blocks, vectors[begin : begin + len(blocks)], rope, begin)
        if refiner is Refiner.plain:
            row.begin(steering.tokens.clone(), None)
            for _ in blocks:
                row.advance()
            return row.x, None
        row.begin(steering.tokens, x)
        made = [
            row.hint() if number < len(self.layout.refiner_places) else row.advance() for number in range(len(blocks))
        ]
        kept = iter([hint for hint in made if hint is not None])
        return row.x, Hints(frozenset(self.layout.refiner_places), lambda: next(kept), steering.scale)


def condition_of(
    given: ControlLatents, channels: int, convention: Convention, grey: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What a ControlNet of so many channels is shown: [batch, channels, height, width] float32.

    Latents of the control picture, then, where it takes them, 1 where the picture stays and that picture's latents.
    Without a mask nothing stays of a grey picture, of which ``grey`` gives the latents [latent channels, height,
    width]; in diffusers' convention zeros stand for both.
    """
    batch, latents, height, width = given.pictures.shape
    if channels == latents:
        return given.pictures
    if given.around is not None and given.kept is not None:
        return torch.cat([given.pictures, given.kept, given.around], dim=1)
    rest = given.pictures.new_zeros(batch, channels - latents, height, width)
    if convention is Convention.trained:
        rest[:, 1:] = grey()
    return torch.cat([given.pictures, rest], dim=1)


class _Row:
    """Blocks one after another, each when it is asked for."""

    def __init__(
        self, net: ControlNet, blocks: list[Block], vectors: list[BlockModulation], rope: RotaryTable, number: int
    ) -> None:
        """``number``: of the first block among all that the net has."""
        self._net, self._blocks, self._vectors, self._rope, self._number = net, blocks, vectors, rope, number
        self._next = 0

    def begin(self, condition: torch.Tensor, x: torch.Tensor | None) -> None:
        """Set the residual stream: the condition, projected and added to x [batch, tokens, dim] where that is given."""
        self.x, self._seen = condition, x

    def advance(self) -> None:
        """Compute a block."""
        with self._block():
            pass

    def hint(self) -> torch.Tensor:
        """Compute a block; what its projection gives."""
        with self._block() as block:
            return cast("ControlBlock", block).after_proj(self.x)

    @contextlib.contextmanager
    def _block(self) -> Iterator[Block]:
        net, place = self._net, self._next
        block, vector = self._blocks[place], self._vectors[place]
        self._next = place + 1
        with present(net.stream, self._number + place):
            if place == 0:
                self._start(block, vector)
            then = None
            if self._next < len(self._blocks):
                then = (self._vectors[self._next].attention_scale, self._blocks[self._next].form)
            attend = net.attend if vector.attention_input is None else net.attend_fp8
            assert attend is not None
            self.x, self._h = block(self.x, self._h, vector, then, self._rope, net.ops, attend)
            yield block

    def _start(self, block: Block, vector: BlockModulation) -> None:
        if self._seen is not None:
            projection = cast("ControlBlock", block).before_proj
            assert projection is not None
            self.x = projection(self.x).add_(self._seen)
        self._h = self._net.ops.scaled_rms_norm(self.x, vector.attention_scale, self._net.config.norm_eps, block.form)
