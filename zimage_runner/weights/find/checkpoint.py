"""A checkpoint on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zimage_runner.weights.find.controlnet import ControlNetFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete diffusers-format directory: model_index.json and one folder a component."""

    path: Path
    revision: str
    """The hub's revision if known, else the digest's first 12 characters."""
    digest: str
    """Identity of the weights (sha256 hex): equal digests mean equal pictures. Empty: they are not here yet."""
    controlnet: ControlNetFile | None = None
    """What ``model.controlnet`` names; no part of ``digest``: pictures that it does not steer are the same without."""
