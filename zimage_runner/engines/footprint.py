"""How much GPU memory a run takes at most, by where its weights are: what ``memory=auto`` goes by. No torch here.

Weights are counted from the checkpoint's configs. What is computed beside them grows with the picture, by factors that
were measured (benchmarks/results, one H200); tests/memory/test_auto.py compares the sums with those measurements.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.caption_features import IN_MEMORY, REFINED
from zimage_runner.engines.precision import Precision
from zimage_runner.memory.policies import GroupOffload, Memory, ModelOffload, Resident, Staged, Streamed
from zimage_runner.model import PATCH, VAE_FACTOR, padded_length
from zimage_runner.weights.formats import controlnet
from zimage_runner.weights.formats.configs import expected_shapes

if TYPE_CHECKING:
    from zimage_runner.engines.request import LoadRequest

UNKNOWN_SIDE = 1024
"""Pixels a side of pictures whose size is not known."""
PLACES = 3
"""Blocks that ``memory=streamed`` has on the device: one computes, one is there, one is on its way."""
TOKEN_VECTORS = {"bf16": 13.2, "eight bits": 10.8, "diffusers": 22.0}
"""What a forward holds a token, in vectors of the transformer's width: 101, 83 and 169 KB."""
DECODE_VECTORS = {"native": 4.4, "diffusers": 10.1}
"""What decoding holds a pixel, in vectors of the decoder's last width: 1.15 and 2.7 GB at 1024x1024."""
WORK = 160_000_000
"""Bytes of cuBLAS' work areas, captions, a step's vectors and the like."""
MERGE_COPIES = 5
"""Copies in float32 of a weight while an adapter is merged into it."""

LARGE = re.compile(
    r"(?P<block>(control_)?((?P<passing>context)_refiner|noise_refiner|layers)\.\d+)\."
    r"(attention\.to_\w+(\.0)?|feed_forward\.w\d|(?P<projection>(before|after)_proj))\.weight"
)
"""Weights that ``memory=streamed`` brings block by block; all but the projections may be in eight bits."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stack:
    """Bytes of a network that is made of blocks."""

    rest: int
    """All but what can be streamed."""
    blocks: tuple[int, ...]
    """The large weights of each block that a forward uses."""
    passing: int
    """Those of the blocks that refine captions: when streamed, on the device while nothing else is computed."""

    @classmethod
    def of(cls, shapes: Shapes, item: int, small: Collection[str] = ()) -> Stack:
        """``item``: bytes of a number; ``small``: blocks whose large weights are in eight bits."""
        rest, passing, blocks = 0, 0, dict[str, int]()
        for name, shape in shapes.items():
            large = LARGE.fullmatch(name)
            if large is None:
                rest += math.prod(shape) * item
                continue
            if large["passing"]:
                passing += math.prod(shape) * item
                continue
            block, is_small = large["block"], large["block"] in small and large["projection"] is None
            blocks[block] = blocks.get(block, 0) + math.prod(shape) * (1 if is_small else item)
            rest += 4 * shape[0] if is_small else 0  # scales
        return cls(rest, tuple(blocks.values()), passing)

    @property
    def whole(self) -> int:
        return self.rest + sum(self.blocks) + self.passing

    @property
    def streamed(self) -> int:
        """What is on the device while blocks come one by one."""
        return self.rest + min(PLACES, len(self.blocks)) * max(self.blocks, default=0)


def native_peaks(request: LoadRequest, precision: Precision, bf16_layers: Iterable[int]) -> dict[type[Memory], int]:
    """Bytes at most on the device under each placement of engine=native, the fastest first."""
    transformer, text, vae = _configs(request.checkpoint.path)
    item = 4 if request.model.dtype.value == "float32" else 2
    shapes = expected_shapes("transformer", transformer)
    names = [f"noise_refiner.{n}" for n in range(transformer["n_refiner_layers"])]
    names += [f"layers.{n}" for n in range(transformer["n_layers"]) if n not in set(bf16_layers)]
    eight = precision is not Precision.bf16
    stacks = [Stack.of(shapes, item, names if eight else ())]
    if request.controlled and (file := request.checkpoint.controlnet) is not None:
        control = controlnet.expected_shapes(file.layout, transformer)
        blocks = {large["block"] for large in map(LARGE.fullmatch, control) if large} if eight else ()
        stacks.append(Stack.of(control, item, blocks))
    # Captions are the last but one hidden states; the table of tokens stays in its file.
    used = expected_shapes("text_encoder", {**text, "num_hidden_layers": text["num_hidden_layers"] - 1})
    encoder = _bytes({name: shape for name, shape in used.items() if name.startswith("layers.")}, item)
    halves = ("decoder.", "post_quant", *(("encoder.",) if request.pictured or request.controlled else ()))
    both = expected_shapes("vae", vae)
    autoencoder = _bytes({name: shape for name, shape in both.items() if name.startswith(halves)}, item)
    pixels, tokens = _largest(request, batch_decodes=False)
    vectors = TOKEN_VECTORS["eight bits" if eight else "bf16"]
    decode = DECODE_VECTORS["native"] * pixels * vae["block_out_channels"][0] * item
    work = max(vectors * tokens * transformer["dim"] * item, decode)
    work = max(work, MERGE_COPIES * 4 * max(map(math.prod, shapes.values()))) if request.adapted else work
    caption, captions = item * _caption_tokens(request), request.captions or REFINED
    beside = autoencoder + int(work) + WORK + caption * transformer["dim"] * min(captions, REFINED)
    drawing = sum(stack.whole for stack in stacks) + beside
    streamed = sum(stack.streamed for stack in stacks) + beside
    features = caption * transformer["cap_feat_dim"] * min(captions, IN_MEMORY)
    return {Resident: encoder + drawing + features, Staged: max(drawing, encoder + WORK), Streamed: streamed}


def diffusers_peaks(request: LoadRequest) -> dict[type[Memory], int]:
    """Bytes at most on the device under each placement of engine=diffusers that is worth taking, the fastest first."""
    transformer, text, vae = _configs(request.checkpoint.path)
    item = 4 if request.model.dtype.value == "float32" else 2
    shapes = expected_shapes("transformer", transformer)
    stack, encoder = Stack.of(shapes, item), _bytes(expected_shapes("text_encoder", text), item)
    autoencoder = _bytes(expected_shapes("vae", vae), item)
    pixels, tokens = _largest(request, batch_decodes=not request.memory.vae_slicing)
    if request.memory.vae_tiling:
        pixels = min(pixels, vae.get("sample_size", UNKNOWN_SIDE) ** 2)
    forward = TOKEN_VECTORS["diffusers"] * tokens * transformer["dim"] * item
    decode = DECODE_VECTORS["diffusers"] * pixels * vae["block_out_channels"][0] * item
    forward = max(forward, MERGE_COPIES * 4 * max(map(math.prod, shapes.values()))) if request.adapted else forward
    drawing = stack.whole + autoencoder + max(forward, decode)
    peaks = {
        Resident: encoder + drawing,
        Staged: max(drawing, encoder),
        ModelOffload: max(encoder, stack.whole + forward, autoencoder + decode),
        GroupOffload: max(2 * max(stack.blocks) + forward, decode),
    }
    return {kind: int(peak + WORK) for kind, peak in peaks.items()}


def _configs(path: Path) -> list[dict[str, Any]]:
    """config.json of the transformer, the text encoder and the VAE."""
    parts = ("transformer", "text_encoder", "vae")
    found = [json.loads((path / part / "config.json").read_text(encoding="utf-8")) for part in parts]
    text = found[1]
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    text.setdefault("attention_bias", False)
    found[2] = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True} | found[2]
    return found


def _caption_tokens(request: LoadRequest) -> int:
    """Of the longest caption, padded."""
    lengths = [
        max(shape.caption_tokens, shape.negative_caption_tokens) or shape.params.max_sequence_length
        for shape in request.shapes
    ]
    return padded_length(max(lengths, default=512))


def _bytes(shapes: Shapes, item: int) -> int:
    return item * sum(map(math.prod, shapes.values()))


def _largest(request: LoadRequest, *, batch_decodes: bool) -> tuple[int, int]:
    """Most pixels that are decoded at a time, and most tokens of a forward."""
    pixels = tokens = 0
    caption = _caption_tokens(request)
    for shape in request.shapes:
        params, batch = shape.params, shape.batch_size
        area = params.height * params.width
        pixels = max(pixels, area * (batch if batch_decodes else 1))
        rows = batch * (2 if params.uses_guidance else 1)
        tokens = max(tokens, rows * (padded_length(area // (VAE_FACTOR * PATCH) ** 2) + caption))
    if not request.shapes:
        pixels = UNKNOWN_SIDE**2
        tokens = pixels // (VAE_FACTOR * PATCH) ** 2 + 512
    return pixels, tokens
