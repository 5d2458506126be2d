"""What happened to an executor's workers, and their reports made one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class WorkerEvents:
    """What happened to the workers, for the report."""

    kind: str
    """Name of the executor."""
    deaths: list[str] = field(default_factory=list)
    recycled: int = 0
    quarantined: list[str] = field(default_factory=list)
    recovery: list[str] = field(default_factory=list)
    """Steps down of all workers' ladders."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the report; long lists are cut."""
        return {
            "kind": self.kind,
            "restarts": len(self.deaths),
            "deaths": self.deaths[:100],
            "recycled": self.recycled,
            "quarantined": self.quarantined[:1000],
        }


def merged(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return a worker's report after those before it; phases stay those of the first, and peaks those of all."""
    memory, peak_before = report.get("gpu_memory") or {}, before.get("gpu_memory") or {}
    peaks = {k: max(v, peak_before.get(k, 0.0)) for k, v in memory.items() if k.startswith("peak_")}
    return {
        **report,
        "phases": before.get("phases") or report.get("phases", {}),
        "gpu_memory": {**memory, **peaks},
        "peak_host_gb": max(report.get("peak_host_gb", 0.0), before.get("peak_host_gb", 0.0)),
    }


def reserved_gb(report: dict[str, Any]) -> float:
    """Return the GPU memory that a worker had reserved when it reported."""
    return (report.get("gpu_memory") or {}).get("reserved_gb", 0.0)
