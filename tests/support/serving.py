"""A service in this process, with a session that needs no model, asked through Starlette's test client."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from tests.support.gated_session import GatedSession
from zimage_runner.cli.main import main as compose
from zimage_runner.config.schema import Composed, RunConfig, ServeConfig
from zimage_runner.serve.app import application
from zimage_runner.serve.service import Service
from zimage_runner.serve.settings import Settings

LOCAL = "http://127.0.0.1:8189"


def settings(*words: str, batch_size: int = 1, item_timeout_s: float | None = None, **server: Any) -> Settings:
    """The settings that a command line of the service means. ``server``: fields of the group, set without composing."""
    composed = _composed(words)
    found = Settings.of(replace(composed, config=_with_server(composed.config, server)))
    engine = replace(found.config.engine, batch_size=batch_size)
    executor = replace(found.config.executor, **({} if item_timeout_s is None else {"item_timeout_s": item_timeout_s}))
    return replace(found, config=replace(found.config, engine=engine, executor=executor), memo=_memo)


_memo: dict[str, Any] = {}
"""What planning finds out of the model, once for all tests."""


def _with_server(config: RunConfig, changes: dict[str, Any]) -> ServeConfig:
    assert isinstance(config, ServeConfig)
    return replace(config, server=replace(config.server, **changes))


@functools.cache
def _composed(words: tuple[str, ...]) -> Composed:
    found: list[Composed] = []

    def take(composed: Composed) -> int:
        found.append(composed)
        composed.remove_unused_directory()
        return 0

    assert compose(["model=zimage_nano", "model.native_sizes=[]", *words], take, serves=True) == 0
    return found[0]


@contextlib.contextmanager
def served(
    executor: str = "inline", *, token: str | None = None, starts: bool = True, **fields: Any
) -> Iterator[TestClient]:
    """A client of a service with the ``fields`` of ``settings``; ``client.service`` is the service itself."""
    words = (f"executor={executor}", *(["executor.backoff_s=0"] if executor == "process" else []))
    service = Service(settings(*words, **fields))
    client = TestClient(application(service, token), base_url=LOCAL, raise_server_exceptions=False)
    client.service = service  # pyright: ignore[reportAttributeAccessIssue]
    try:
        if not starts:
            yield client
            return
        with client:
            assert service.scheduler.ready.wait(60), service.scheduler.trouble
            yield client
    finally:
        if GatedSession.gate is not None:
            GatedSession.gate.release(1000)
        assert service.close()


def pixels_of(data: bytes) -> np.ndarray:
    """Pixels of a picture's file."""
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def body(prompt: str = "a cat", **fields: Any) -> dict[str, Any]:
    """A request for a small picture."""
    return {"prompt": prompt, "size": "32x32", "seed": 1, **fields}
