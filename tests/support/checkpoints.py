"""Checkpoints that a test changes, and the refusal of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.resolve import resolve


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refused(path: Path, text: str) -> None:
    """Check that the folder is refused, in one line that holds this text."""
    with pytest.raises(UserError, match=text) as error:
        resolve(Model(name="l", source=Source.local, path=str(path)))
    assert "\n" not in str(error.value)
