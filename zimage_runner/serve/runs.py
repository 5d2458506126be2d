"""Runs that were asked for: kept on disk from the moment they are accepted, drawn one after the other.

Whatever ends the service, the next one goes on with what is queued (run_files.py). Each is an ordinary run: ``resume``,
``view`` and ``collect`` know it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from zimage_runner.cli.resume.saved import SETTINGS
from zimage_runner.config.schema import Composed
from zimage_runner.errors import EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, EXIT_OK, UserError, error_text
from zimage_runner.logs import quiet, refusals, say
from zimage_runner.outputs.run_dir import remove_if_empty
from zimage_runner.runner.execute import execute
from zimage_runner.runner.pool import Lease, SharedExecutor, lent
from zimage_runner.runner.spec import RunSpec
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.fields import RunRequest, parse, plan_run_request
from zimage_runner.serve.run_files import DONE, FAILED, OPEN, QUEUED, RUNNING, STOPPED, RunFiles, ServedRun
from zimage_runner.serve.scheduler import Scheduler
from zimage_runner.serve.settings import Settings
from zimage_runner.serve.settled import SettledItems
from zimage_runner.serve.turns import Turns
from zimage_runner.signals import StopRequest

log = logging.getLogger(__name__)

MAX_TROUBLES = 3
"""Models that may be lost in a row with a run that draws nothing meanwhile, before it is set aside."""


class RunQueue:
    """Accepts runs, draws them with the scheduler's model, and remembers them."""

    def __init__(self, settings: Settings, scheduler: Scheduler) -> None:
        """Take over what an earlier process has left. Raises UserError if another one has this queue."""
        self._settings = settings
        self._scheduler = scheduler
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="runs", daemon=True)
        self._files = RunFiles(settings.root)
        self.uploads = self._files.uploads
        self._runs = {run.id: run for run in self._files.load()}
        self.items = SettledItems()

    def start(self) -> None:
        """Begin to draw what is queued."""
        self._thread.start()

    def close(self, patience_s: float = 60.0) -> bool:
        """Finish the pictures in flight; what is left is drawn by the next process. False if that takes longer."""
        with self._changed:
            self._closing = True
            for run in self._runs.values():
                if run.state == RUNNING:
                    run.stop.set("SIGTERM")
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(patience_s)
            if self._thread.is_alive():
                return False  # the folder stays locked while this process lives
        self._files.close()
        return True

    def accept(self, request: RunRequest) -> ServedRun:
        """Plan a run, keep it on disk and queue it. Raises ApiError, UserError."""
        self._check_room()
        spec = plan_run_request(request, self._settings)
        now = datetime.now()
        name = f"{spec.config.name}/{now:%Y-%m-%d_%H-%M-%S.%f}-{secrets.token_hex(2)}"
        run = ServedRun(
            id=f"run-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(6)}",
            created=time.time(),
            directory=name,
            planned=len(spec.plan),
            request=request.model_dump(),
        )
        with self._changed:
            self._check_room()
            try:
                self._files.save(run)
            except OSError as error:
                raise ApiError(507, f"the run cannot be kept on disk: {error.strerror}") from None
            self._runs[run.id] = run
            self._changed.notify_all()
        return run

    def note_trouble(self) -> None:
        """The process ends with the run that is being drawn: after a few times it is set aside."""
        for run in list(self._runs.values()):
            if run.state == RUNNING:
                run.troubles += 1
                given_up = run.troubles >= MAX_TROUBLES
                self._settle(run, STOPPED if given_up else QUEUED, "it could not go on" if given_up else None)

    def _check_room(self) -> None:
        if self._closing:
            raise ApiError(503, "the service is ending", retry_after_s=10)
        if self.waiting >= self._settings.server.max_runs:
            raise ApiError(429, "there is no room for another run", code="queue_full", retry_after_s=60)

    def get(self, id: str) -> ServedRun:
        """Raises ApiError."""
        run = self._runs.get(id)
        if run is None:
            raise ApiError(404, f"there is no run {id!r:.80}", code="not_found")
        return run

    def all(self) -> list[ServedRun]:
        """Newest first."""
        return sorted(self._runs.copy().values(), key=lambda run: run.created, reverse=True)

    @property
    def waiting(self) -> int:
        """Runs that are queued or being drawn."""
        return sum(run.state in OPEN for run in list(self._runs.values()))

    def stop(self, run: ServedRun) -> None:
        """End a run early, after the pictures in flight; ``resume`` finishes it. One that has ended stays so."""
        with self._changed:
            if run.state == QUEUED:
                self._settle(run, STOPPED)
            elif run.state == RUNNING:
                run.stop.set("DELETE")

    def _settle(self, run: ServedRun, state: str, error: str | None = None) -> None:
        with self._changed:
            run.state, run.error = state, error
            self._changed.notify_all()
        try:
            self._files.save(run)
        except OSError as failure:
            log.error("%s: its state %s cannot be kept: %s", run.id, state, failure.strerror)
        if state not in OPEN:
            with self._changed:
                run.request = {}  # it may be megabytes
                for old in self._files.without_oldest(self._runs.values()):
                    del self._runs[old.id]

    def _live(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._first() is not None)
                if self._closing:
                    return
                run = self._first()
                assert run is not None
                run.state, run.started = RUNNING, None
                run.stop = StopRequest()
            while not self._scheduler.ready.wait(0.2):
                if self._closing or run.stop or self._scheduler.gave_up.is_set():
                    break
            else:
                self._draw(run)
                continue
            with self._changed:
                run.state = QUEUED
            if run.stop.signal_name == "DELETE":
                self._settle(run, STOPPED)
            elif self._closing or self._scheduler.gave_up.is_set():
                return

    def _first(self) -> ServedRun | None:
        return min(
            (run for run in self._runs.values() if run.state == QUEUED), key=lambda run: run.created, default=None
        )

    def _draw(self, run: ServedRun) -> None:
        before = run.settled_before = self.settled(run)[0]
        run.started = time.time()
        try:
            code, error = self._execute(run)
        except KeyboardInterrupt:  # stopped before its first picture
            code, error = EXIT_INTERRUPTED, None
        except Exception as failure:
            log.error("%s: %s", run.id, error_text(failure), exc_info=failure)
            code, error = EXIT_ITEMS_FAILED, "the run could not be drawn: the service's log says why"
        if code == EXIT_OK:
            self._settle(run, DONE)
        elif run.stop.signal_name == "DELETE":
            self._settle(run, STOPPED)
        elif self._closing:
            self._settle(run, QUEUED)
        elif code == EXIT_INTERRUPTED or (error is not None and not self._scheduler.ready.is_set()):
            run.troubles = 1 if self.settled(run)[0] > before else run.troubles + 1
            given_up = run.troubles >= MAX_TROUBLES
            self._settle(run, STOPPED if given_up else QUEUED, "it could not go on" if given_up else None)
        else:
            self._settle(run, FAILED, error or "some pictures failed: its summary.json lists them")
        say(f"{run.id}: {run.state}, {self.settled(run)[0]} of {run.planned} pictures in {run.directory}")

    def _execute(self, run: ServedRun) -> tuple[int, str | None]:
        """Draw a run as the command line does. Return its exit code, and why it was refused."""
        directory = self.path(run)
        begun = os.path.lexists(directory / SETTINGS)
        changes: dict[str, Any] = {"resume": str(directory)} if begun else {}
        refused: list[str] = []
        token, silence = refusals.set(refused), quiet.set(not self._settings.server.log_prompts)
        try:
            config = plan_run_request(parse(RunRequest, run.request), self._settings, **changes).config
            files = self._settings.files_of_run(config)
            composed = Composed(config=config, directory=directory, there=self._settings.root, files=files)
            shared = _Lent(self._scheduler, run, self._settings.memo)
            with lent(shared):
                code = execute(composed)
        except (ApiError, UserError) as error:
            return EXIT_ITEMS_FAILED, str(error)
        finally:
            refusals.reset(token)
            quiet.reset(silence)
            remove_if_empty(directory, self._settings.root)
        assert isinstance(code, int)
        return code, refused[-1] if refused else None

    def path(self, run: ServedRun) -> Path:
        """The run directory."""
        return self._settings.root / run.directory

    def settled(self, run: ServedRun) -> tuple[int, int]:
        """Pictures that are drawn, and pictures that failed, as the ledger has them."""
        try:
            return self.items.counts(self.path(run))
        except OSError:
            return 0, 0


class _Lent(SharedExecutor):
    """The service's model, as a run takes it."""

    def __init__(self, scheduler: Scheduler, run: ServedRun, memo: dict[str, Any]) -> None:
        super().__init__(run.stop)
        self.memo = memo
        self.label = run.id
        self._turns = Turns(scheduler)

    @contextlib.contextmanager
    def lease(self, spec: RunSpec) -> Iterator[Lease]:
        yield Lease(self, self._turns)

    def close(self) -> None:
        self._turns.close()
