"""The text encoder with one layer on the device at a time: every caption goes through a layer before the next comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from zimage_runner.engines.native.kernels import Operations
from zimage_runner.engines.native.loading import TEXT_ENCODER_RULES, assign
from zimage_runner.engines.native.text_encoder import Qwen3Layer, TextEncoder, TextEncoderConfig
from zimage_runner.engines.native.token_table import TokenTable

TOKENS_AT_ONCE = 65536
"""Of all captions that go through the layers together: their hidden states take 0.3 GB at Z-Image's width."""


class StreamedTextEncoder:
    """Computes what ``TextEncoder`` does, bit for bit: each caption by itself, whatever comes with it."""

    def __init__(
        self,
        config: TextEncoderConfig,
        open_tensors: Callable[[], Mapping[str, torch.Tensor]],
        device: str,
        dtype: torch.dtype,
    ) -> None:
        """``open_tensors`` gives the checkpoint's tensors, each of them read when it is asked for."""
        self._config, self._open, self._device, self._dtype = config, open_tensors, device, dtype
        with torch.device("meta"):
            self._rotary = TextEncoder(config).rotary

    @torch.inference_mode()
    def encode(self, captions: Sequence[Sequence[int]], table: TokenTable, ops: Operations) -> list[torch.Tensor]:
        """Features [tokens, hidden_size] of each caption's token ids."""
        features = []
        for some in _portions(captions):
            features += self._encode(some, table, ops)
        return features

    def _encode(self, captions: Sequence[Sequence[int]], table: TokenTable, ops: Operations) -> list[torch.Tensor]:
        tensors = self._open()
        hidden = [table.vectors(ids)[None].to(self._device) for ids in captions]
        with torch.device("cpu"):
            turns = [self._rotary(len(ids)).to(self._device) for ids in captions]
        for number in range(self._config.num_hidden_layers - 1):
            layer = self._layer(number, tensors)
            for x, turn in zip(hidden, turns):
                layer(x, turn, ops)
        return [x[0] for x in hidden]

    def _layer(self, number: int, tensors: Mapping[str, torch.Tensor]) -> Qwen3Layer:
        with torch.device("meta"):
            layer = Qwen3Layer(self._config)
        part = (self._device, self._dtype, "text_encoder", f"layers.{number}.")
        return assign(layer, tensors, TEXT_ENCODER_RULES, "", *part)


def _portions(captions: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Captions in order, as many at a time as their tokens allow."""
    portion: list[Sequence[int]] = []
    for caption in captions:
        if portion and sum(map(len, portion)) + len(caption) > TOKENS_AT_ONCE:
            yield portion
            portion = []
        portion.append(caption)
    if portion:
        yield portion
