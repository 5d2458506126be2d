from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the faults of this test's sessions: faults({"on": 3, "kind": "raise"}, ITEM_SECONDS=0.1)."""

    def arm(*wanted: dict, **variables: object) -> None:
        monkeypatch.setenv("FAULTS", json.dumps(wanted))
        monkeypatch.setenv("FAULTS_DIR", str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(f"FAULTS_{name}", str(value))

    return arm
