"""What a prompt is, and what every source of prompts must do."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NOTHING: Mapping[str, Any] = {}
"""The one empty mapping that prompts without overrides or metadata share, so that a million of them stay small."""


def _nothing() -> Mapping[str, Any]:
    return NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a run, before it is multiplied by seeds."""

    text: str
    """Caption as it goes to the text encoder (after template expansion)."""
    source: str = ""
    """Where it came from, as ``file:line`` or a config field, for messages."""
    id: str | None = None
    """The user's own name for it; free text, unique within a run when given."""
    index: int | None = None
    """Its number in the whole source, before offset, sample or shard; null means its place in the list."""
    overrides: Mapping[str, Any] = field(default_factory=_nothing)
    """Sampling fields that differ for this prompt; keys are names in ``sampling.SAMPLING_FIELDS``."""
    seeds: tuple[int, ...] | None = None
    """Seeds for this prompt alone, instead of the run's."""
    metadata: Mapping[str, Any] = field(default_factory=_nothing)
    """Carried unchanged into the record; holds only what JSON can."""


@dataclass(kw_only=True, slots=True)
class PromptSource(abc.ABC):
    """An option of the ``prompts`` group. The fields here pick from what the source yields, in this order."""

    offset: int = 0
    """Skip this many prompts first."""
    limit: int | None = None
    """Then take at most this many."""
    sample: int | None = None
    """Then draw this many of those at random, kept in their order."""
    sample_seed: int = 0
    """Decides which ones ``sample`` draws."""
    shard: str | None = None
    """Then keep every n-th: "1/4" to "4/4" split the prompts over four runs."""

    @abc.abstractmethod
    def read(self) -> Iterator[Prompt]:
        """Yield the prompts in order. Raises UserError with field or file:line on bad input."""
