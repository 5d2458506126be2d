"""What the first picture does for the first time, done before it, while the weights are still on their way.

The first encode and the first forward take the host half a second in which the GPU idles: cuBLAS and cuDNN open their
libraries, look for algorithms, and the driver loads every kernel when it is first launched. None of that needs the
weights. So a miniature of the model, a layer or two of each kind, makes the same calls at the first picture's shape,
with pieces of the arriving memory for parameters. What it computes is garbage and nobody's: the miniature shares with
the model neither layers nor caches nor recordings, draws no random numbers and writes to no weight.

It runs in a thread of its own, beside the captions' encoding: PyTorch's operators and the driver's calls leave the
interpreter to others. Where captions need no encoding, the thread that draws would only wait; there it does it itself,
which also leaves it cuDNN's plans, kept by PyTorch for each thread. Both on the default stream: the work is
milliseconds, and the memory that it returns to PyTorch's allocator is the first forward's to take.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from zimage_runner.engines.native.attention import unswitched
from zimage_runner.engines.native.description import Description
from zimage_runner.engines.native.kernels import prebuilt, torch_ops
from zimage_runner.engines.native.kernels.fused_ops import next_power_of_2
from zimage_runner.engines.native.loading import FLOAT32
from zimage_runner.engines.native.model import NativeModel
from zimage_runner.engines.native.rope import SEQUENCE_MULTIPLE
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.engines.native.text_encoder import TextEncoder
from zimage_runner.engines.native.transformer import Transformer
from zimage_runner.errors import error_text
from zimage_runner.warmup import WarmupShape
from zimage_runner.weights.source import TEXT_ENCODER, WeightsSource

log = logging.getLogger(__name__)

Work = Callable[["Preheat"], None]

PREHEAT = "ZIMAGE_RUNNER_PREHEAT"
"""Environment variable: 1 preheats; ``thread`` does it in a thread of its own even where nothing is to be encoded."""
ALIGNMENT = 256
"""Bytes that each parameter begins at a multiple of, as in a prepared file: cuBLAS chooses its kernels by it."""

_begun = False
"""Once in a process: afterwards libraries and kernels are there."""


class Preheat:
    """One run of ``work``, which must never make the run that it is for fail."""

    def __init__(self, work: Work | None = None, *, in_thread: bool = True) -> None:
        """Begin it; without ``in_thread`` it is over when this returns."""
        self._started = time.perf_counter()
        self._thread: threading.Thread | None = None
        if work is None:
            return
        if in_thread:
            # No daemon: a thread that is in torch's C++ when the interpreter goes takes the exit code with it (abort).
            self._thread = threading.Thread(target=self._run, args=(work,), name="preheat")
            self._thread.start()
        else:
            self._run(work)

    def wait(self) -> None:
        """Until it is over. Needed before anything is recorded as a CUDA graph, and before the process ends."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if torch.cuda.is_initialized():
            # A thread's cuBLAS takes a work area of its own. Not freed by that thread: between taking it and launching
            # with it, another would lose its own.
            torch._C._cuda_clearCublasWorkspaces()

    def tell(self, what: str) -> None:
        """Log that it is done."""
        log.debug("preheat: %s after %.3f s", what, time.perf_counter() - self._started)

    def _run(self, work: Work) -> None:
        failed = False
        try:
            work(self)
        except Exception as error:  # whatever it is, the picture does without, or meets it again and tells
            failed = True
            log.debug("not preheated: %s", error_text(error))
        if failed and torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()
        self.tell("done")


def begin(model: NativeModel, weights: WeightsSource, shape: WarmupShape | None, encodes: bool) -> Preheat:
    """Preheat ``model`` for ``shape`` where that is switched on and pays: in a process's first wait for weights."""
    switch = os.environ.get(PREHEAT, "")
    if switch in ("", "0") or _begun or shape is None:
        return Preheat()
    in_thread = encodes or switch == "thread"
    try:
        work = _prepare(model, weights, shape, encodes, switches=not in_thread)
    except Exception as error:  # as in Preheat._run
        log.debug("not preheated: %s", error_text(error))
        work = None
    return Preheat(work, in_thread=in_thread)


def _prepare(
    model: NativeModel, weights: WeightsSource, shape: WarmupShape, encodes: bool, *, switches: bool
) -> Work | None:
    """What is to be done; None where no weights are on their way or kernels would have to be compiled."""
    global _begun
    memory = weights.arriving()  # which waits for it to be allocated, as the first use of a weight would
    if memory is None or not _comes_compiled(model):
        return None
    _begun = True
    small = miniature(model, switches=switches)

    def work(preheat: Preheat) -> None:
        try:
            lend(small, memory)
            # Once its weights are there, the thread that draws is about to load the encoder's kernels itself.
            if encodes and not weights.has_arrived(TEXT_ENCODER):
                preheat_encoder(small, shape)
                preheat.tell("text encoder")
            preheat_transformer(small, shape)
            preheat.tell("transformer")
        finally:
            dismantle(small)

    return work


def _comes_compiled(model: NativeModel) -> bool:
    """Whether no kernel has to be compiled: Triton's compiler is not for two threads at once."""
    if model.ops is torch_ops:
        return True
    ready = prebuilt.for_device(torch.cuda.current_device())
    return ready is not None and has_widths(ready.entries, model.description)


def has_widths(kernels: Iterable[str], description: Description) -> bool:
    """Whether those of ``kernels`` (keys of Prebuilt.entries) that depend on a model's widths suit this one's."""
    transformer, encoder = description.transformer, description.text_encoder
    heads = f"HEADS={next_power_of_2(transformer.n_heads)},HEAD_DIM={transformer.head_dim},"
    wanted = [("qk_norm_rope(", heads)] + [
        ("scaled_rms_norm(", f"BLOCK={next_power_of_2(width)} ") for width in (transformer.dim, encoder.hidden_size)
    ]
    there = list(kernels)
    return all(any(key.startswith(name) and f" {constants}" in key for key in there) for name, constants in wanted)


def miniature(model: NativeModel, *, switches: bool) -> NativeModel:
    """A layer or two of each kind, as wide as the model's, on the meta device.

    Made by the thread that makes the model, because ``with torch.device`` leaves traces that all threads see. Without
    ``switches`` the attention backend is called directly, because switching to it concerns all threads too.
    """
    description = replace(
        model.description,
        text_encoder=replace(model.description.text_encoder, num_hidden_layers=2),  # the last one is never computed
        transformer=replace(
            model.description.transformer,
            n_layers=min(2, model.description.transformer.n_layers),  # the last one drops the caption's tokens
            n_refiner_layers=min(1, model.description.transformer.n_refiner_layers),
        ),
    )
    options = replace(model.options, cuda_graphs=0, rehearse_decoder=False)
    attention = model.attention if switches else unswitched(model.attention)
    small = NativeModel(description, model.tokenizer, options, attention)
    with torch.device("meta"):
        small.text_encoder = TextEncoder(description.text_encoder)
        small.transformer = Transformer(description.transformer, small.ops, attention.attend)
    return small


def lend(small: NativeModel, memory: torch.Tensor) -> None:
    """Pieces of ``memory`` (uint8) for all parameters. Raises ValueError if one of them alone is larger."""
    for module in (small.text_encoder, small.transformer):
        _lend_module(module, memory, small.options.dtype)


def _lend_module(module: nn.Module, memory: torch.Tensor, dtype: torch.dtype) -> None:
    """One piece behind the other, from the start again where the memory ends."""
    place = 0
    for name, parameter in list(module.named_parameters()):
        kind = torch.float32 if FLOAT32.match(name) else dtype
        nbytes = parameter.numel() * kind.itemsize
        if place + nbytes > len(memory):
            place = 0
        if nbytes > len(memory):
            raise ValueError(f"{name} takes {nbytes} bytes, more than the {len(memory)} that are on their way")
        piece = memory[place : place + nbytes].view(kind).view(parameter.shape)
        place += -(-nbytes // ALIGNMENT) * ALIGNMENT
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(piece, requires_grad=False))


def preheat_encoder(small: NativeModel, shape: WarmupShape) -> None:
    """Encode a caption of the shape's length."""
    small.encode_ids([0] * _tokens(shape.caption_tokens))


@torch.inference_mode()
def preheat_transformer(small: NativeModel, shape: WarmupShape) -> None:
    """One step of the shape's denoising, refining its captions included."""
    params, vae = shape.params, small.description.vae
    guidance = Guidance(
        scale=params.guidance_scale, normalization=params.cfg_normalization, truncation=params.cfg_truncation
    )
    negatives = [_caption(small, shape.negative_caption_tokens)] * shape.batch_size if params.uses_guidance else None
    sides = (params.height // vae.scale, params.width // vae.scale)
    noise = torch.zeros(shape.batch_size, small.description.transformer.in_channels, *sides)
    small.denoise([_caption(small, shape.caption_tokens)] * shape.batch_size, noise, 1, guidance, negatives)


def _caption(small: NativeModel, padded: int) -> torch.Tensor:
    width = small.description.transformer.cap_feat_dim
    return torch.zeros(_tokens(padded), width, device=small.device, dtype=small.options.dtype)


def _tokens(padded: int) -> int:
    """Of a caption that is padded to so many; 0 is unknown. All but one in 32 captions do have padding."""
    return max(padded, SEQUENCE_MULTIPLE) - 1


def dismantle(small: NativeModel) -> None:
    """Let go of the borrowed memory now: a model is part of reference cycles."""
    small.forget()
    del small.text_encoder, small.transformer
