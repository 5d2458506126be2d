"""``executor=inline``: the session lives in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from zimage_runner.errors import check_range
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import Batch, BatchResult, Executor, ExecutorConfig, SessionFactory, SessionLike
from zimage_runner.executors.watchdog import Watchdog, WatchedSession
from zimage_runner.memory.policies import Health
from zimage_runner.plan import Encoding
from zimage_runner.signals import StopRequest
from zimage_runner.warmup import WarmupShape


@dataclass(kw_only=True, slots=True)
class InlineExecutorConfig(ExecutorConfig):
    """Nothing between the runner and the model: the least overhead, and a crash ends the run (resumable)."""

    item_timeout_s: float = 21_600.0
    """Seconds one picture may take; a batch may take this for each of its items. Then it fails and the run ends, to be
    resumed: a process cannot give up what it is computing itself. A slow CPU's large picture may take hours."""

    def __post_init__(self) -> None:
        check_range("executor.item_timeout_s", self.item_timeout_s, 1e-3, 1e9)

    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        return InlineExecutor(make_session, auto_batch=auto_batch, item_timeout_s=self.item_timeout_s)


class InlineExecutor(Executor):
    """Calls the session directly. A session checks its memory's health itself."""

    overlaps = True

    def __init__(
        self, make_session: SessionFactory, *, auto_batch: bool = False, item_timeout_s: float = 21_600.0
    ) -> None:
        self._make_session = make_session
        self._auto_batch = auto_batch
        self._watchdog = Watchdog(item_timeout_s)
        self._session: WatchedSession | None = None
        self._backoff: MemoryBackoff | None = None

    def start(self) -> dict[str, Any]:
        self._session = WatchedSession(self._make_session(), self._watchdog)
        self._session.start()
        self._backoff = MemoryBackoff(cast("SessionLike", self._session), auto_batch=self._auto_batch)
        return self.report()

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> bool:
        if self._session is None:
            return False
        self._session.extend(shapes, texts)
        return True

    def run(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        if self._backoff is None or self._session is None:
            raise RuntimeError("the executor was not started")
        self._session.on_overdue = self.on_overdue
        for batch in batches:
            yield from self._backoff.run(batch)

    def report(self) -> dict[str, Any]:
        if self._session is None or self._backoff is None:
            raise RuntimeError("the executor was not started")
        return {**self._session.report(), **self._backoff.report(), "executor": {"kind": "inline"}}

    def close(self) -> None:
        self._watchdog.close()
        session, self._session, self._backoff = self._session, None, None
        if session is not None:
            session.close()
