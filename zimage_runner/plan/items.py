"""One picture to draw, and the batch it may join."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from zimage_runner.errors import counted
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import SAMPLING_FIELDS, Lora, SamplingParams

SLUG_CHARACTERS = 40
"""In CJK 120 bytes; with index and temporary suffixes below the 143 bytes that the strictest file systems allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Items that can be one batch: same tensor shapes, same schedule, same guidance."""

    params: SamplingParams
    """What the pictures of a batch have in common; see ``SamplingParams.of_batch``."""
    caption_tokens: int
    """Padded length; 0 when no tokenizer was at hand to count."""
    negative_caption_tokens: int
    """Padded length of the negative prompt; 0 without guidance or when not counted."""

    @classmethod
    def of(cls, params: SamplingParams, caption_tokens: int, negative_caption_tokens: int) -> Bucket:
        """Return the bucket of an item with these parameters and padded caption lengths."""
        return cls(
            params=params.of_batch(),
            caption_tokens=caption_tokens,
            negative_caption_tokens=negative_caption_tokens,
        )

    @property
    def cost(self) -> tuple[Any, ...]:
        """Grows with memory and time; of one set of adapters the plan runs the largest first.

        So what cannot fit fails early.
        """
        params = self.params
        return (params.height * params.width, params.uses_guidance, self.caption_tokens, *self.sort_key)

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """Orders any two buckets: numbers by size, texts by their letters, null before both."""
        values = [getattr(self.params, name) for name in SAMPLING_FIELDS]
        return tuple(_comparable(v) for v in (*values, self.caption_tokens, self.negative_caption_tokens))

    def __str__(self) -> str:
        params = self.params
        guidance = f", guidance {params.guidance_scale:g}" if params.uses_guidance else ""
        tokens = f", {self.caption_tokens} caption tokens" if self.caption_tokens else ""
        loras = "".join(f", {lora}" for lora in params.loras)
        steps = counted(params.forwards, "step")
        inputs = f", {said}" if params.inputs and (said := str(params.inputs)) else ""
        return f"{params.width}x{params.height}, {steps}{guidance}{tokens}{loras}{inputs}"


def _comparable(value: Any) -> tuple[int, float, str]:
    if value is None:
        return (0, 0.0, "")
    return (1, value, "") if isinstance(value, int | float) else (2, 0.0, str(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """One picture to draw. Prompt, params and bucket are shared between items."""

    prompt_index: int
    """The prompt's number in its source."""
    seed: int
    prompt: Prompt
    params: SamplingParams
    bucket: Bucket

    @property
    def item_dir(self) -> str:
        """Its directory below the run directory, unique in the run; also its key in the ledger."""
        return f"items/{self.prompt_index:05d}_{slug(self.prompt.id or self.prompt.text)}/seed_{self.seed}"


Encoding = tuple[str, int, *tuple[Lora, ...]]
"""A text, its max_sequence_length, and the adapters that change the text encoder."""


def item_encodings(item: WorkItem) -> list[Encoding]:
    """Return what must be encoded of the caption and, with guidance, of the negative prompt."""
    params = item.params
    key = (params.max_sequence_length, *params.encoder_loras)
    texts = [item.prompt.text, *([params.negative_prompt] if params.uses_guidance else [])]
    return [(text, *key) for text in texts]


@functools.lru_cache(maxsize=1024)
def slug(text: str) -> str:
    """A folder name that a person recognises: ASCII and CJK letters and digits, at most 40 characters.

    Everything else, control and bidirectional characters included, becomes one underscore.
    """
    plain = unicodedata.normalize("NFKD", text[:400])
    plain = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", plain)).lower()
    words = re.sub(_UNSAFE, "_", plain).strip("_")
    return words[:SLUG_CHARACTERS].strip("_") or "prompt"


_UNSAFE = re.compile(
    "[^a-z0-9"
    "\u3005\u3007\u3041-\u3096\u30a1-\u30fa\u30fc"  # iteration mark, zero, hiragana, katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"  # Han, hangul
    "\U00020000-\U0003134f]+"  # Han extensions B to G
)
