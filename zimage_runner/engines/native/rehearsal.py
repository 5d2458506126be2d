"""The decoder's first run at a size, done ahead while the GPU is busy with the forwards before it.

For the host the first decode of a size is 0.4 s of work, for the GPU 0.02: cuDNN plans every convolution, CUDA loads
every kernel. It has to be done by the thread that will decode: PyTorch keeps cuDNN's plans for each thread.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import torch

from zimage_runner.engines.faults import is_out_of_memory
from zimage_runner.engines.native.vae_decoder import VaeDecoder

log = logging.getLogger(__name__)

START = 2
"""Step after whose forward it begins: the GPU then has about three forwards to do, as much as its queue takes."""
LAYERS = 3
"""Of the decoder, after each forward: with more at a time the GPU would run out of work meanwhile."""

ToHost = Callable[[list[torch.Tensor]], object]


class Rehearsals:
    """Knows the sizes that the decoder has run at."""

    def __init__(self, wanted: bool, to_host: ToHost) -> None:
        """``to_host`` is what becomes of decoded pictures. Without ``wanted`` there are no rehearsals."""
        self._wanted, self._to_host = wanted, to_host
        self._known: set[tuple[int, int]] = set()

    def decoded(self, latents: torch.Tensor) -> None:
        """Pictures of this size need none any more."""
        self._known.add(sides(latents))

    def begin(self, latents: torch.Tensor, vae: VaeDecoder) -> Iterator[None]:
        """One layer at each ``next``, for latents of this size; nothing to do for a size that is known."""
        if not self._wanted or sides(latents) in self._known:
            return iter(())
        self._known.add(sides(latents))
        return self._rehearse(vae, *sides(latents))

    def _rehearse(self, vae: VaeDecoder, height: int, width: int) -> Iterator[None]:
        yield from vae.rehearse(height, width)
        like, scale = vae.conv_out.weight, vae.config.scale
        shape = (1, vae.config.out_channels, height * scale, width * scale)
        pixels = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        self._to_host([pixels])
        yield


def advance(rehearsal: Iterator[None], step: int, steps: int) -> None:
    """Some layers more, after the forward of ``step``; none after the last one, when the decoder itself is next."""
    if not START <= step < steps - 1:
        return
    try:
        for _ in itertools.islice(rehearsal, LAYERS):
            pass
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # It ends the rehearsal; whether decoding fits will be seen.
        log.debug("decoder not rehearsed: %s", error)


def sides(latents: torch.Tensor) -> tuple[int, int]:
    """Height and width."""
    return latents.shape[2], latents.shape[3]
