"""Caption features of a session: each text is encoded once, then kept in memory, and on disk where there is a cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from zimage_runner.engines.embedding_cache import Caption, EmbeddingCache
from zimage_runner.sampling import Lora

if TYPE_CHECKING:
    import torch

    from zimage_runner.engines.base import Engine

IN_MEMORY = 4096
"""Captions whose features are kept in memory: 512 x 2560 bf16 is 2.6 MB at worst, a usual caption a tenth of that."""
REFINED = 256
"""Captions whose refined form, 512 x 3840 bf16 at worst, engine=native keeps on the device."""
WORTH_FREEING = 64e6
"""Bytes of features whose loss may let a batch fit that did not."""


class CaptionFeatures:
    """Encodes texts with the session's engine and keeps what came of it."""

    def __init__(self, engine: Callable[[], Engine], *, ahead: bool = False) -> None:
        """``engine``: the one at hand; a session that is rebuilt has another."""
        self._engine = engine
        self.ahead = ahead
        """Whether the text encoder makes room for the denoiser once the work begins. Everything is encoded before then,
        kept in host memory, and nothing is dropped: encoding it again would unload the denoiser."""
        self._kept: OrderedDict[Caption, torch.Tensor] = OrderedDict()
        self.disk: EmbeddingCache | None = None

    def encode(
        self, texts: Sequence[str], max_sequence_length: int, loras: tuple[Lora, ...] = ()
    ) -> list[torch.Tensor]:
        """Return the features [L_i, cap_feat_dim] of each text, encoding those that are not there yet.

        ``loras``: the adapters that change the text encoder, which the engine has been given (``Engine.adapt``).
        """
        captions: list[Caption] = [(text, max_sequence_length, *loras) for text in texts]
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        missing = [caption for caption in missing if not self._read_back(caption)]
        if missing:
            features = self._engine().encode([caption[0] for caption in missing], max_sequence_length)
            for caption, embeds in zip(missing, features, strict=True):
                self._kept[caption] = embeds.cpu() if self.ahead else embeds
                if self.disk is not None:
                    self.disk.put(caption, embeds)
        result = [self._kept[caption] for caption in captions]
        for caption in captions:
            self._kept.move_to_end(caption)
        while len(self._kept) > IN_MEMORY and not self.ahead:
            self._kept.popitem(last=False)
        return result

    def encode_ahead(self, captions: Iterable[Caption]) -> dict[str, float]:
        """Encode all of these where that has to be done before the work. Return the seconds of the phase, if any."""
        if not self.ahead:
            return {}
        started = time.perf_counter()
        alike: dict[tuple[int, tuple[Lora, ...]], list[str]] = {}
        for text, length, *loras in dict.fromkeys(captions):
            alike.setdefault((length, tuple(loras)), []).append(text)
        for (length, loras), texts in alike.items():
            self._engine().adapt(loras)
            self.encode(texts, length, loras)
        return {"encode": time.perf_counter() - started}

    def free_memory(self) -> bool:
        """Drop the features, unless they cannot be made again. Return whether that was enough to matter on the GPU."""
        if self.ahead:
            return False
        on_gpu = sum(embeds.nbytes for embeds in self._kept.values() if embeds.is_cuda)
        self._kept.clear()
        return on_gpu > WORTH_FREEING

    def clear(self) -> None:
        """Drop all that is in memory."""
        self._kept.clear()

    def _read_back(self, caption: Caption) -> bool:
        """Take the features from the disk. Return False if they are not there."""
        embeds = None if self.disk is None else self.disk.get(caption, "cpu" if self.ahead else self._engine().device)
        if embeds is None:
            return False
        self._kept[caption] = embeds
        return True
