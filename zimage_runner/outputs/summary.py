"""The end of a run: summary.json and the table that is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.precision import likeness_text
from zimage_runner.errors import one_line
from zimage_runner.outputs.since import process_seconds

if TYPE_CHECKING:
    from zimage_runner.outputs.writer import Outcome

LISTED = 1000
"""Failures named in summary.json; all are in records.jsonl."""
PRINTED = 10
"""Failures named on the terminal."""
WORKERS_PRINTED = 16
"""Workers with a line of their own; of more, only what is common to them."""
SHOWN_SECONDS = 0.005
"""Shorter phases are not told of in one line."""
LONGEST_ERROR = 300
"""Characters of an error on the terminal."""


def resume_command(run_dir: Path) -> str:
    """What to type, in the folder where the run was started, to finish it."""
    return shlex.join([_python(), "-m", "zimage_runner", f"resume={run_dir}"])


def _python() -> str:
    """This interpreter: by its name if the shell finds it by that, else by its path."""
    name, path = Path(sys.executable).name, sys.executable
    if (found := shutil.which(name)) is not None and os.path.abspath(found) == path:
        return name
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


class Summary:
    """Collects outcomes (from any thread) and tells the run's story.

    Phases are timed apart: load and warm-up come from the session's report; the first image is the time from
    ``start_clock`` to its pixels on the host; the images after it are timed from arrival to arrival. ``total_seconds``
    begins when the session is ready; ``process_seconds`` is everything since the program was started.
    """

    def __init__(self, run_dir: Path, *, planned: int, already_done: int = 0) -> None:
        self.run_dir = run_dir
        self.planned = planned
        """Items of the whole plan."""
        self.already_done = already_done
        """Of these, finished by an earlier process."""
        self.linked = 0
        """Pictures that an earlier run or another prompt had already: linked instead of drawn."""
        self.ok = 0
        self.failed: list[dict[str, str]] = []
        self.truncated: list[dict[str, Any]] = []
        """Prompts cut to max_sequence_length: {"prompt", "tokens", "limit"} or whatever the caller records."""
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._clock = self._started
        self._last_settled = self._started
        self._waited = 0.0
        self._arrivals: list[tuple[float, float, float]] = []
        """Of each image: when it was on the host, its seconds, and when the device began with it."""

    def start_clock(self) -> None:
        """The session is ready: the first image counts from here."""
        self._clock = self._last_settled = time.perf_counter()

    def leave_out_wait(self) -> None:
        """The run's end begins. Where it comes late, what has passed since the last picture was another run's time."""
        if self.settled == self.planned:
            self._waited = time.perf_counter() - self._last_settled

    @property
    def settled(self) -> int:
        """Items that are done or failed, those of earlier processes included."""
        return self.already_done + self.linked + self.ok + len(self.failed)

    def add(self, outcome: Outcome) -> None:
        """Count a finished or failed item."""
        with self._lock:
            self._last_settled = time.perf_counter()
            if outcome.status == "ok":
                self.ok += 1
                self._arrivals.append((outcome.arrived, outcome.seconds, outcome.since))
            elif outcome.status == "failed":
                self.failed.append({"item": outcome.request.item_dir, "error": outcome.error or ""})

    def to_dict(self, report: dict[str, Any], *, stopped: str | None = None, is_settled: bool = True) -> dict[str, Any]:
        """summary.json. ``report`` is the executor's; ``stopped`` is why the run ended early.

        ``is_settled``: whether files of many pictures are finished, and uploaded where that is asked for.
        """
        remaining = self.planned - self.settled
        ended_early = bool(remaining) or not is_settled
        unfinished = bool(ended_early or self.failed)
        stopped = (stopped or "some items were not reached") if ended_early else None
        return {
            "run_dir": str(self.run_dir),
            "status": "stopped" if stopped else "failures" if self.failed else "complete",
            "stopped": stopped,
            "items": {
                "planned": self.planned,
                "done_before": self.already_done,
                "linked": self.linked,
                "ok": self.ok,
                "failed": len(self.failed),
                "remaining": remaining,
            },
            "phases": report.get("phases", {}),
            "images": self._image_seconds(),
            "total_seconds": time.perf_counter() - self._started - self._waited,
            "process_seconds": process_seconds(),
            "session": report,
            "failed": self.failed[:LISTED],
            "truncated": self.truncated,
            "resume": resume_command(self.run_dir) if unfinished else None,
        }

    def _image_seconds(self) -> dict[str, float]:
        if not self._arrivals:
            return {}
        arrivals = sorted(self._arrivals)
        first, _, since = arrivals[0]
        found = {"first_seconds": first - max(self._clock, since)}
        after = sorted(seconds for arrived, seconds, _ in arrivals if arrived > first)
        if after:
            found["mean_seconds"] = statistics.fmean(after)
            found["median_seconds"] = statistics.median(after)
            found["p95_seconds"] = after[min(len(after) - 1, round(0.95 * (len(after) - 1)))]
            found["images_per_second"] = len(after) / max(1e-9, arrivals[-1][0] - first)
        return found


def table(summary: dict[str, Any]) -> str:
    """The table printed at the end of a run."""
    items, images = summary["items"], summary["images"]
    rows = [(name.replace("_", " "), f"{seconds:.2f} s") for name, seconds in summary["phases"].items()]
    rows += _warmup_rows(summary["session"])
    if images:
        rows.append(("first image", f"{images['first_seconds']:.2f} s"))
    if "mean_seconds" in images:
        rows.append(
            (
                "images after that",
                f"mean {images['mean_seconds']:.3f} s, median {images['median_seconds']:.3f} s, "
                f"p95 {images['p95_seconds']:.3f} s",
            )
        )
        rows.append(("throughput", f"{images['images_per_second']:.2f} images/s"))
    rows += _memory_rows(summary["session"])
    rows += _likeness_rows(summary["session"])
    rows += _worker_rows(summary["session"])
    rows.append(("total", _total(summary)))
    rows.append(("items", _counts(items)))
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"  {name:<{width}}  {value}" for name, value in rows] + _notes(summary))


def brief(summary: dict[str, Any]) -> str:
    """The table in one line, for a job among many; what went wrong follows on lines of its own."""
    images, phases = summary["images"], summary["phases"]
    parts = [_counts(summary["items"])]
    parts += [f"first image {images['first_seconds']:.2f} s"] if images else []
    parts += [f"then {images['mean_seconds']:.3f} s each"] if "mean_seconds" in images else []
    parts += [f"{name.replace('_', ' ')} {phases[name]:.2f} s" for name in phases if phases[name] >= SHOWN_SECONDS]
    return "\n".join([", ".join(parts), *_notes(summary)])


def _total(summary: dict[str, Any]) -> str:
    drawing, process = f"{summary['total_seconds']:.2f} s", summary.get("process_seconds")
    if process is None:
        return f"{drawing} of drawing and writing"
    return f"{process:.2f} s since the program was started, of which {drawing} of drawing and writing"


def _counts(items: dict[str, int]) -> str:
    counts = f"{items['ok']} done"
    for key, words in (
        ("done_before", "done before"),
        ("linked", "linked"),
        ("failed", "failed"),
        ("remaining", "not done"),
    ):
        counts += f", {items[key]} {words}" if items[key] else ""
    return counts


def _warmup_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Seconds of each warm-up pass, when there were several: they stop falling once it is warm."""
    passes = report.get("warmup_passes") or []
    if len(passes) < 2:
        return []
    shown = ", ".join(f"{p['label']} {p['seconds']:.2f} s" for p in passes[:PRINTED])
    more = f" and {len(passes) - PRINTED} more in summary.json" if len(passes) > PRINTED else ""
    return [("warm-up passes", shown + more)]


def _memory_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    gpu, host = report.get("gpu_memory") or {}, report.get("peak_host_gb")
    rows = []
    if "placement_why" in report:
        rows.append(("memory=auto took", f"{report['placement']}: {report['placement_why']}"))
    if gpu:
        rows.append(
            ("peak GPU memory", f"{gpu['peak_allocated_gb']:.2f} GB ({gpu['peak_reserved_gb']:.2f} GB reserved)")
        )
    if host:
        rows.append(("peak host memory", f"{host:.2f} GB"))
    return rows


def _likeness_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How near these weights' pictures in eight bits are to those in bf16, as ``compare`` found."""
    if "likeness" not in report:
        return []
    known = report["likeness"]
    if known is None:
        return [("likeness to bf16", "not measured: python -m zimage_runner compare --help")]
    return [("likeness to bf16", likeness_text(known))]


def _worker_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What each worker has done, where there are several; of many, the middle and the slowest."""
    workers = [w for w in report.get("executor", {}).get("workers", ()) if w["images"] or w["died"]]
    if len(workers) < 2:
        return []
    if len(workers) <= WORKERS_PRINTED:
        return [(w["worker"].partition(" on ")[0], _worker(w)) for w in workers]
    pace = [w["images_per_second"] for w in workers if w["images"]] or [0.0]
    idle = statistics.median(w["idle_share"] for w in workers)
    died = sum(w["died"] for w in workers)
    told = f"{len(workers)}, {statistics.median(pace):.2f} images/s each (the slowest {min(pace):.2f}), idle {idle:.0%}"
    return [("workers", told + (f", {died} died" if died else ""))]


def _worker(figures: dict[str, Any]) -> str:
    told = f"{figures['images']} images, {figures['images_per_second']:.2f} images/s, idle {figures['idle_share']:.0%}"
    _, on, node = figures["worker"].partition(" on ")
    return told + (f", on {node}" if on else "") + (", died" if figures["died"] else "")


def _recoveries(report: dict[str, Any]) -> list[str]:
    """What had to be given way to during the run."""
    found = list(report.get("recovery", []))[:PRINTED]
    workers = report.get("executor", {})
    if workers.get("restarts"):
        found.append(
            f"workers that died and were replaced: {workers['restarts']} (the last one {workers['deaths'][-1]})"
        )
    if workers.get("recycled"):
        found.append(f"workers that were replaced for their size or age: {workers['recycled']}")
    return found


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = [f"  note: {one_line(note, LONGEST_ERROR)}" for note in _recoveries(summary["session"])]
    notes += [f"  failed: {f['item']}: {one_line(f['error'], LONGEST_ERROR)}" for f in summary["failed"][:PRINTED]]
    if (more := summary["items"]["failed"] - PRINTED) > 0:
        notes.append(f"  ... and {more} more failed: see records.jsonl")
    if summary["stopped"]:
        notes.append(f"  stopped: {one_line(summary['stopped'], LONGEST_ERROR)}")
    if summary["resume"]:
        notes.append(f"  to finish this run: {summary['resume']}")
    return notes
