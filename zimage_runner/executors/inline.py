"""``executor=inline``: the session lives in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zimage_runner.errors import error_text
from zimage_runner.executors.base import (
    Batch,
    BatchResult,
    Executor,
    ExecutorConfig,
    SessionFactory,
    SessionLike,
)

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class InlineExecutorConfig(ExecutorConfig):
    """Nothing between the runner and the model: the least overhead, and a crash ends the run (resumable)."""

    def create(self, make_session: SessionFactory) -> Executor:
        return InlineExecutor(make_session)


class InlineExecutor(Executor):
    """Calls the session directly."""

    def __init__(self, make_session: SessionFactory) -> None:
        self._make_session = make_session
        self._session: SessionLike | None = None

    def start(self) -> dict[str, Any]:
        self._session = self._make_session()
        self._session.start()
        return self._session.report()

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        for batch in batches:
            yield from generate(self._started(), batch)

    def report(self) -> dict[str, Any]:
        return self._started().report()

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _started(self) -> SessionLike:
        if self._session is None:
            raise RuntimeError("the executor was not started")
        return self._session


def generate(session: SessionLike, batch: Batch) -> Iterator[BatchResult]:
    """The batch's results; when a batch fails its items are drawn one by one, so that only the culprit fails."""
    try:
        done = session.generate(batch.items, attempt=batch.attempt)
        yield BatchResult(items=batch.items, images=done.images, details=done.details, attempt=batch.attempt)
        return
    except Exception as error:
        message = error_text(error)
        log.debug("batch failed", exc_info=True)
    if len(batch.items) == 1:
        yield BatchResult(items=batch.items, error=message, attempt=batch.attempt)
        return
    log.warning("a batch of %d failed (%s): drawing its pictures one by one", len(batch.items), message)
    for item in batch.items:
        yield from generate(session, Batch(items=[item], attempt=batch.attempt))
