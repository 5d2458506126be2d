"""What a finished process left behind: its pictures and when each was complete, phases, memory, jobs of a sweep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.variants import Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """A process's pictures in the order in which their files were complete."""

    times: list[float]
    """Seconds since the epoch."""
    batch_sizes: list[int]
    """How many pictures were drawn together with each of them, itself included."""

    @property
    def first_batch(self) -> int:
        """Pictures that came with the first one."""
        return min(self.batch_sizes[0], len(self.times)) if self.batch_sizes else 1


def pictures(variant: Variant, out: Path) -> Pictures:
    """Pictures below ``out``. For this runner the time is that of the file's final name, by the inode's change."""
    files = out.rglob("items/*/*/image.png") if variant.script is None else out.glob("*.png")
    found = sorted((path.stat().st_ctime, _batch_size(path)) for path in files)
    return Pictures(times=[at for at, _ in found], batch_sizes=[size for _, size in found])


def _batch_size(image: Path) -> int:
    record = image.with_name("record.json")
    return json.loads(record.read_text(encoding="utf-8")).get("batch_size", 1) if record.exists() else 1


def readings(variant: Variant, out: Path) -> dict[str, Any]:
    """Phases (seconds) and memory (GB) that the process left; empty when it died before writing any.

    Of a sweep, the phases are its first job's, and ``jobs`` tells of each.
    """
    if variant.script is not None:
        path = out / "phases.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    paths = sorted((out / "runs").rglob("summary.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not paths:
        return {}
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    summary = summaries[0]
    session = summary["session"]
    return {
        "phases": {**session["load_phases"], **session["phases"]},
        "memory": {k: v for k, v in summaries[-1]["session"].get("gpu_memory", {}).items() if k.startswith("peak")},
        "warmup_passes": session.get("warmup_passes", []),
        "images": summary["images"],
        "attention": session.get("attention"),
        "engine": session.get("numerics", {}).get("engine"),
        "batch_sizes": session.get("batch_sizes", {}),
        **({"jobs": [_job(summary) for summary in summaries]} if len(paths) > 1 else {}),
    }


def _job(summary: dict[str, Any]) -> dict[str, Any]:
    phases = summary["session"]["phases"]
    return {"load": phases["load"], "warm_up": phases["warm_up"], "image": summary["images"].get("first_seconds")}
