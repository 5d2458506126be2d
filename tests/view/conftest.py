"""A gallery of a folder, asked in this process or served to a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra web is not installed")
pytest.importorskip("uvicorn", reason="the extra web is not installed")

from starlette.testclient import TestClient

from tests.support.gallery import opened

LOCAL = "http://127.0.0.1:8188"


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """``gallery(root)``: a client that asks the application of ``root``."""
    stack = []

    def make(root: Path, base: str = LOCAL, **options: Any) -> TestClient:
        context = opened(root, tmp_path / "cache", **options)
        gallery, app = context.__enter__()
        stack.append(context)
        client = TestClient(app, base_url=base)
        client.gallery = gallery  # pyright: ignore[reportAttributeAccessIssue]
        return client

    yield make
    for context in reversed(stack):
        context.__exit__(None, None, None)
