"""A run's items in the order they are drawn, and what is worth knowing before drawing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from zimage_runner.plan.items import Bucket, Encoding, WorkItem, item_encodings
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import Lora, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """A caption that is longer than max_sequence_length; its end will not be read by the model."""

    prompt: Prompt
    field: str
    """text or negative_prompt."""
    tokens: int
    max_sequence_length: int

    def __str__(self) -> str:
        what = "the prompt" if self.field == "text" else "the negative prompt"
        return (
            f"{self.prompt.source or 'prompt'}: {what} has {self.tokens} tokens, the last "
            f"{self.tokens - self.max_sequence_length} are cut off (max_sequence_length={self.max_sequence_length})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicate:
    """A picture that an earlier prompt already draws: same text, sampling and seed."""

    prompt: Prompt
    first: Prompt
    seeds: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class Plan:
    """All items of a run in the order they are drawn: by adapters, then bucket, prompt and seed."""

    items: list[WorkItem]
    prompts: list[Prompt]
    truncations: list[Truncation] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    caption_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens of each unique text before truncation, template included; empty when no tokenizer was at hand."""

    def __len__(self) -> int:
        return len(self.items)

    def batches(
        self,
        batch_size: int = 1,
        done: Callable[[WorkItem], bool] | None = None,
        items: Iterable[WorkItem] | None = None,
    ) -> Iterator[list[WorkItem]]:
        """Lists of at most ``batch_size`` items of one bucket, without those that ``done`` says are finished.

        ``items``: a part of the plan's, in its order.
        """
        batch: list[WorkItem] = []
        for item in self.items if items is None else items:
            if done is not None and done(item):
                continue
            if batch and (len(batch) == batch_size or batch[0].bucket is not item.bucket):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def encodings(self) -> Iterator[Encoding]:
        """Each (text, max_sequence_length, adapters ...) that must be encoded, once, in the order of first use."""
        seen: set[Encoding] = set()
        last: WorkItem | None = None
        for item in self.items:
            if last is not None and item.prompt is last.prompt:
                continue
            last = item
            for key in item_encodings(item):
                if key not in seen:
                    seen.add(key)
                    yield key

    def params(self) -> set[SamplingParams]:
        """Return every set of sampling parameters that the plan draws with."""
        found: dict[int, SamplingParams] = {id(item.params): item.params for item in self.items}
        return set(found.values())

    def loras(self) -> dict[Lora, int]:
        """Number of items that each adapter at each weight is for, in the order they run."""
        counts: dict[Lora, int] = {}
        for item in self.items:
            for lora in item.params.loras:
                counts[lora] = counts.get(lora, 0) + 1
        return counts

    def buckets(self) -> dict[Bucket, int]:
        """Number of items of each bucket, in the order they run."""
        counts: dict[Bucket, int] = {}
        for item in self.items:
            counts[item.bucket] = counts.get(item.bucket, 0) + 1
        return counts
