"""The service's parts, put together: model, queue of runs, pictures kept, counts."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from zimage_runner.errors import EXIT_ITEMS_FAILED
from zimage_runner.logs import say
from zimage_runner.outputs.config import Output
from zimage_runner.serve.kept import KeptPictures
from zimage_runner.serve.metrics import Metrics
from zimage_runner.serve.runs import RunQueue
from zimage_runner.serve.scheduler import Scheduler
from zimage_runner.serve.settings import Settings

GB = 1e9
Values = dict[str, tuple[str, str, float]]


class Service:
    """Everything that lives as long as the process. ``start``, then ``close``."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is loaded yet. Raises UserError if the queue of runs cannot be opened."""
        server, config = settings.server, settings.config
        self.settings = settings
        self.scheduler = Scheduler(
            settings.executor,
            most_waiting=server.queue,
            largest_batch=config.engine.largest_batch,
            on_overdue=self._leave,
        )
        self.runs = RunQueue(settings, self.scheduler)
        self.pool = ThreadPoolExecutor(config.output.writer_threads, thread_name_prefix="pictures")
        self.kept = KeptPictures(seconds=server.url_minutes * 60, most_bytes=server.url_mb * 1e6)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = threading.Event()
        """The service is ending: nothing new is taken."""

    def start(self) -> None:
        """Load the model, and go on with the runs that are queued."""
        self.scheduler.start()
        self.runs.start()
        self.pool.submit(_encode_once, self.settings.config.output)

    def close(self) -> bool:
        """End after the pictures in flight. Runs that are not done go on at the next start.

        Returns False when something did not end within ``server.drain_s``; only the end of the process ends it.
        """
        self.draining.set()
        patience = self.settings.server.drain_s
        ended = [self.runs.close(patience), self.scheduler.close(patience)]
        self.pool.shutdown(wait=all(ended))
        return all(ended)

    def _leave(self, reason: str) -> None:
        """End the process: a model in it that hangs cannot be ended in another way. The next one goes on."""
        self.draining.set()
        self.runs.note_trouble()
        say(f"zimage_runner: a picture {reason}: the service ends, to be started again; finished pictures are kept")
        os._exit(EXIT_ITEMS_FAILED)

    @property
    def why_not_ready(self) -> str | None:
        """Why nothing can be drawn right now; None when it can."""
        if self.draining.is_set():
            return "the service is ending"
        if self.scheduler.ready.is_set():
            return None
        return self.scheduler.trouble or "the model is being loaded"

    def metrics_text(self) -> str:
        """Return all counts and readings for Prometheus."""
        scheduler, report = self.scheduler, self.scheduler.report()
        executor, memory = report.get("executor", {}), report.get("gpu_memory") or {}
        values: Values = {
            "ready": ("gauge", "1 when the model is loaded and warm.", float(self.why_not_ready is None)),
            "queue_pictures": ("gauge", "Pictures of requests that wait.", scheduler.waiting),
            "queue_runs": ("gauge", "Runs that wait or are drawn.", self.runs.waiting),
            "pictures_total": ("counter", "Pictures drawn, of requests and runs.", scheduler.drawn),
            "seconds_per_picture": ("gauge", "Seconds a picture, of the last ones.", scheduler.seconds_per_picture),
            "model_restarts_total": ("counter", "Sessions that were lost.", scheduler.restarts),
            "worker_restarts_total": ("counter", "Worker processes that died.", executor.get("restarts", 0)),
            "recycles_total": (
                "counter", "Sessions replaced for their memory.",
                executor.get("recycled", 0) + report.get("recycled", 0),
            ),
            "host_memory_peak_bytes": ("gauge", "Peak memory of this process.", _peak_bytes()),
            "url_pictures_bytes": ("gauge", "Pictures kept for their URLs.", self.kept.bytes),
        }  # fmt: skip
        for name, value in sorted(memory.items()):
            if isinstance(value, int | float):
                plain = name.removesuffix("_gb")
                values[f"gpu_memory_{plain}_bytes"] = ("gauge", f"GPU memory, {plain}.", value * GB)
        return self.metrics.text(values)


def _encode_once(output: Output) -> None:
    """Import what pictures are encoded with while the model is loaded, or the first request waits for it: 0.2 s."""
    import numpy as np

    from zimage_runner.outputs.encoders import encode

    encode(np.zeros((1, 1, 3), dtype=np.uint8), {}, replace(output, metadata=False))


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
