"""What a prompt is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = {}
"""The one empty mapping that prompts without overrides or metadata share, so that a million of them stay small."""


def _nothing() -> Mapping[str, Any]:
    return NOTHING


class LoraWord(NamedTuple):
    """An adapter as a prompt names it."""

    name: str
    """A file's path, or its name in one of ``lora_dirs``."""
    weight: float


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
    """Sampling fields that differ for this prompt; keys are in ``sampling.SAMPLING_FIELDS`` and ``PICTURE_FIELDS``."""
    loras: tuple[LoraWord, ...] = ()
    """Adapters for this prompt beside the run's; of one that the run has too, this weight holds."""
    lora_weights: tuple[float, ...] = ()
    """Weights of the run's adapters in their order, for this prompt alone; the last one goes on."""
    seeds: tuple[int, ...] | None = None
    """Seeds for this prompt alone, instead of the run's."""
    metadata: Mapping[str, Any] = field(default_factory=_nothing)
    """Carried unchanged into the record; holds only what JSON can."""
