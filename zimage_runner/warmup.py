"""What is run once before the first item: the ``warmup`` config group.

Warm-up draws its own prompt through the same calls as the work, after the model was loaded, placed and compiled;
its pictures are thrown away. Every pass is timed, so that one sees when the engine is warm.

The padded caption length is a shape too: attention kernels are planned, and CUDA graphs recorded, for the number of
tokens. It concerns the transformer alone, so that a further length of a size costs one step instead of a picture.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zimage_runner.engines.picture_latents import Posteriors
from zimage_runner.engines.request import WarmupShape, denoise_request
from zimage_runner.errors import UserError
from zimage_runner.pictures.placed import blank

if TYPE_CHECKING:
    import torch

    from zimage_runner.engines.base import Engine

WARMUP_PROMPT = "a quiet lake at dawn, warm-up picture that is never saved"
WARMUP_SEED = 0
HARDWARE_PASSES = 3
"""The article's step 4."""

Encode = Callable[[Sequence[str], int], "list[torch.Tensor]"]
"""Caption features of texts, as ``Engine.encode``; the session's own call, so that features are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupPass:
    """One timed pass: what it was and how long it took, device synchronised."""

    label: str
    seconds: float


@dataclass(kw_only=True, slots=True)
class Warmup(abc.ABC):
    """An option of the ``warmup`` group."""

    @abc.abstractmethod
    def run(self, engine: Engine, shapes: Sequence[WarmupShape], encode: Encode) -> list[WarmupPass]:
        """Warm the engine for every shape that the plan contains; return the seconds of each pass."""

    @property
    def generates(self) -> bool:
        """True when the warm-up draws pictures, so that its prompt has to be encoded."""
        return False


@dataclass(kw_only=True, slots=True)
class NoWarmup(Warmup):
    """Start with the first item at once: the fastest way to the first picture."""

    def run(self, engine: Engine, shapes: Sequence[WarmupShape], encode: Encode) -> list[WarmupPass]:
        return []


@dataclass(kw_only=True, slots=True)
class Hardware(Warmup):
    """The article's step 4: a few small bf16 convolutions, which create the CUDA context and load cuDNN."""

    def run(self, engine: Engine, shapes: Sequence[WarmupShape], encode: Encode) -> list[WarmupPass]:
        return convolutions(engine)


@dataclass(kw_only=True, slots=True)
class Generate(Warmup):
    """Real generations at every shape of the plan, through the same calls as the work."""

    passes: int = 1
    """Generations per shape."""

    def __post_init__(self) -> None:
        check_passes(self.passes)

    def run(self, engine: Engine, shapes: Sequence[WarmupShape], encode: Encode) -> list[WarmupPass]:
        return generations(engine, shapes, encode, self.passes)

    @property
    def generates(self) -> bool:
        return True


@dataclass(kw_only=True, slots=True)
class Article(Warmup):
    """The article's steps 3 and 4 in its order: a generation, then the convolutions. After compiling, not before."""

    passes: int = 1
    """Generations per shape."""

    def __post_init__(self) -> None:
        check_passes(self.passes)

    def run(self, engine: Engine, shapes: Sequence[WarmupShape], encode: Encode) -> list[WarmupPass]:
        return generations(engine, shapes, encode, self.passes) + convolutions(engine)

    @property
    def generates(self) -> bool:
        return True


def check_passes(passes: int) -> None:
    if passes < 1:
        raise UserError(f"warmup.passes={passes} is below 1: use 1 or more, or warmup=none")


def generations(engine: Engine, shapes: Sequence[WarmupShape], encode: Encode, passes: int) -> list[WarmupPass]:
    """``passes`` generations (encode, denoise, decode) of the warm-up prompt at each shape."""
    results = []
    for shape in shapes:
        for n in range(passes):
            started = time.perf_counter()
            _generate(engine, shape, encode)
            engine.synchronize()
            results.append(WarmupPass(label=f"{shape.label} #{n + 1}", seconds=time.perf_counter() - started))
    return results


def convolutions(engine: Engine) -> list[WarmupPass]:
    """Three 3x3 convolutions on a bf16 tensor [1, 3, 64, 64], as the article prints them: unpadded, so it shrinks."""
    import torch

    started = time.perf_counter()
    dummy = torch.randn(1, 3, 64, 64, device=engine.device, dtype=torch.bfloat16)
    kernel = torch.randn(3, 3, 3, 3, device=engine.device, dtype=torch.bfloat16)
    for _ in range(HARDWARE_PASSES):
        dummy = torch.nn.functional.conv2d(dummy, kernel)
    engine.synchronize()
    return [WarmupPass(label="hardware", seconds=time.perf_counter() - started)]


def _generate(engine: Engine, shape: WarmupShape, encode: Encode) -> None:
    params, n = shape.params, shape.batch_size
    inputs = params.inputs
    if not shape.whole:
        inputs = inputs and replace(inputs, control_start=0.0, control_end=1.0)
        params = params.overridden({"num_inference_steps": 1, "inputs": inputs})
    caption = _sized(encode([WARMUP_PROMPT], params.max_sequence_length)[0], shape.caption_tokens)
    negatives = None
    if params.uses_guidance:
        negative = encode([params.negative_prompt], params.max_sequence_length)[0]
        negatives = [_sized(negative, shape.negative_caption_tokens)] * n
    seeds = range(WARMUP_SEED, WARMUP_SEED + n)
    placed = None if inputs is None else [blank(inputs, params.width, params.height)] * n
    posterior = Posteriors(lambda: engine)
    request = denoise_request(engine, params, [caption] * n, negatives, seeds, placed=placed, posterior=posterior)
    latents = engine.denoise(request)
    if shape.whole:
        engine.decode(latents).wait()


def _sized(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """Caption features repeated and cut so that they are padded to ``tokens`` rows; unchanged for 0.

    One row less than ``tokens``, because captions that need no padding take another path through the transformer,
    which 31 of 32 prompts do not.
    """
    if not tokens:
        return embeds
    return embeds.repeat(-(-tokens // len(embeds)), 1)[: tokens - 1].contiguous()
