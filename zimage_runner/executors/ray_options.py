"""The options of ``executor=ray``, checked."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from zimage_runner.errors import UserError, check_range
from zimage_runner.executors.workers import WorkersConfig

AUTO = "auto"


class Writes(enum.Enum):
    """Who writes the pictures."""

    auto = "auto"
    """Workers on other machines that see the run directory write there; all others send their pictures."""
    driver = "driver"
    """The process that was started."""
    worker = "worker"
    """The worker that drew them, always; a worker that does not see the run directory is refused."""


@dataclass(kw_only=True, slots=True)
class RayOptions(WorkersConfig):
    """Ray starts and places the workers; this process has the plan and the ledger."""

    address: str | None = None
    """Of a running Ray cluster (host:port, or auto for the one of this machine); null starts Ray here for this run."""
    workers: Any = AUTO  # int | str
    """auto: one for each GPU of the cluster (without GPUs: one), more when nodes join. A number, or "2-8": at most
    eight, and it is refused where fewer than two find room within start_timeout_s."""
    num_gpus: Any = AUTO  # float | str
    """GPUs of each worker; auto: one, or none where the cluster has none or engine.device is cpu."""
    num_cpus: Any = AUTO  # float | str
    """CPU cores of each worker; auto: one beside a GPU, without GPUs all of a node."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources of each worker, by the names that the nodes were given (ray start --resources=...)."""
    writes: Writes = Writes.auto
    """Who writes the pictures: auto, driver or worker."""
    object_store_gb: float | None = None
    """Of a Ray that is started for this run: shared memory for pictures on their way; null: Ray's own choice."""
    verbose: bool = False
    """Show Ray's own messages on the terminal."""

    def __post_init__(self) -> None:
        WorkersConfig.__post_init__(self)  # super() does not know a dataclass with slots
        if self.object_store_gb is not None:
            check_range("executor.object_store_gb", self.object_store_gb, 0.08, 1e5)
            if self.address is not None:
                raise UserError(
                    f"executor.object_store_gb={self.object_store_gb:g} is decided when a cluster is started: "
                    "leave it out with executor.address"
                )
        for name in ("num_gpus", "num_cpus"):
            _amount(f"executor.{name}", getattr(self, name))
        for name, amount in self.resources.items():
            check_range(f"executor.resources.{name}", amount, 1e-4, 1e9)
        _ = self.bounds

    @property
    def bounds(self) -> tuple[int, int] | None:
        """Least and most workers; None for auto. Raises UserError."""
        words = str(self.workers).strip()
        if words == AUTO:
            return None
        low, _, high = words.partition("-")
        try:
            least, most = (1, int(low)) if not high else (int(low), int(high))
        except ValueError:
            raise UserError(f"executor.workers={words}: write auto, a number like 4, or bounds like 2-8") from None
        if not 1 <= least <= most <= 100_000:
            raise UserError(f"executor.workers={words}: use 1 to 100,000 workers, the smaller bound first")
        return least, most

    @property
    def shares_gpu(self) -> bool:
        """Whether several workers draw on one GPU."""
        return self.num_gpus != AUTO and 0 < self.num_gpus < 1


def _amount(field: str, value: object) -> None:
    if value == AUTO:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{field}={value}: write auto or a number")
    check_range(field, value, 0, 10_000)
