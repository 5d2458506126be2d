"""A gallery of a folder, asked in this process or served to a browser. Needs the extra ``web``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from zimage_runner.view.gallery import Gallery
from zimage_runner.view.server import application


def eventually(check: Callable[[], Any], seconds: float = 8.0) -> Any:
    """The first true answer of ``check``."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.03)
    return found


@contextmanager
def opened(root: Path, cache: Path, **options: Any) -> Iterator[tuple[Gallery, Any]]:
    """A gallery that has read everything once, and its application. Tests look by themselves: no thread does."""
    gallery = Gallery(str(root), cache, 10**9)
    gallery.watcher.start = gallery.watcher.look  # pyright: ignore[reportAttributeAccessIssue]
    gallery.watcher.is_alive = lambda: False
    gallery.watcher.look()
    try:
        yield gallery, application(gallery, **options)
    finally:
        gallery.close()


@contextmanager
def served(root: Path, cache: Path) -> Iterator[str]:
    """The address of a gallery that is served by a thread of this process."""
    gallery = Gallery(str(root), cache, 10**9)
    config = uvicorn.Config(
        application(gallery), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        gallery.close()
