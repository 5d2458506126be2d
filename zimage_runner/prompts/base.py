"""What a prompt is, and what every source of prompts must do."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a run, before it is multiplied by seeds."""

    text: str
    """Caption as it goes to the text encoder (after template expansion)."""
    source: str = ""
    """Where it came from, as ``file:line`` or a config field, for messages."""
    id: str | None = None
    """The user's own name for it; free text, unique within a run when given."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Sampling fields that differ for this prompt; keys are names in ``sampling.SAMPLING_FIELDS``."""
    seeds: tuple[int, ...] | None = None
    """Seeds for this prompt alone, instead of the run's."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Carried unchanged into the record."""


@dataclass(kw_only=True, slots=True)
class PromptSource(abc.ABC):
    """An option of the ``prompts`` group."""

    @abc.abstractmethod
    def read(self) -> Iterator[Prompt]:
        """Yield the prompts in order. Raises UserError with field or file:line on bad input."""
