"""A service of a session without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra web is not installed")
pytest.importorskip("uvicorn", reason="the extra web is not installed")

from starlette.testclient import TestClient

from tests.support.gated_session import GatedSession
from tests.support.serving import served


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAULTS_DIR", str(tmp_path))
    monkeypatch.setattr("zimage_runner.serve.settings.ServedSession", GatedSession)
    monkeypatch.setattr(GatedSession, "gate", None)
    monkeypatch.setattr(GatedSession, "waits", threading.Event())
    monkeypatch.setattr(GatedSession, "batches", [])


@pytest.fixture
def serve() -> Iterator[Callable[..., TestClient]]:
    """``serve(**fields)``: a client of a service that is ready."""
    open_ones = []

    def make(**options: Any) -> TestClient:
        context = served(**options)
        client = context.__enter__()
        open_ones.append(context)
        return client

    yield make
    for context in reversed(open_ones):
        context.__exit__(None, None, None)
