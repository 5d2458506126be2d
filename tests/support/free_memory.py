"""A GPU with so much free memory that one placement of ``memory=auto`` fits, and none that is better."""

from __future__ import annotations

from typing import Any

import pytest

from zimage_runner.engines import placing
from zimage_runner.engines.base import EngineConfig
from zimage_runner.engines.request import LoadRequest
from zimage_runner.memory.choice import FRAGMENTS, KERNELS
from zimage_runner.memory.policies import Auto, Memory


def with_room(monkeypatch: pytest.MonkeyPatch, module: Any, kind: type[Memory]) -> list[Any]:
    """Have an engine see a device on which ``kind`` fits and nothing better; what it was asked to place."""
    asked: list[Any] = []

    def place(engine: EngineConfig, wanted: LoadRequest, device: str, free: int | None = None) -> Any:
        asked.append(wanted.memory)
        peak = placing.possible(engine, wanted).get(kind, 0) if isinstance(wanted.memory, Auto) else 0
        return placing.place(engine, wanted, "cuda", int((peak + KERNELS) / (1 - FRAGMENTS)) + 1)

    monkeypatch.setattr(module, "place", place)
    return asked
