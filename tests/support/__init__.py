"""Fakes, fixtures and helpers that several test modules share. The tests lie in a folder for each room."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "zimage_runner" / "assets" / "zimage_nano"
"""The embedded checkpoint."""
