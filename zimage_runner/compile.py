"""Compiling the transformer: the ``compile`` config group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Compile:
    """No compilation: nothing to wait for before the first picture."""

    @property
    def label(self) -> str:
        """Short name for records and fingerprints: compiled code rounds differently."""
        return "none"
