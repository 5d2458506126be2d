"""Real Ray on this machine: a cluster of several nodes, small, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zimage_runner.executors.ray_start import started_lean

STORE = 100 * 2**20
"""Bytes of each node's object store."""
RAYLET = "raylet/raylet"
"""In the command line of a node's process."""
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 2000}
"""A node that is gone is noticed within seconds."""


class Nodes:
    """A running cluster. Nodes are added from the main thread."""

    def __init__(self, cluster: Any, count: int) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self.added: list[Any] = [self.add() for _ in range(count)]

    def add(self, attempts: int = 3) -> Any:
        """Start one more. Ray gives a node 30 s, which is not enough on a machine that is very busy."""
        try:
            return self._cluster.add_node(wait=False, num_cpus=1, object_store_memory=STORE)
        except Exception as error:
            if attempts == 1 or "timed out" not in str(error):
                raise
            return self.add(attempts - 1)

    def remove(self, node: Any) -> None:
        """End a node as a machine ends whose power is cut, with all that runs on it.

        Left alone, its workers would draw on for a second or so, and a short run would be over before they end.
        """
        on_it = processes("ray::", below=node.all_processes["raylet"][0].process.pid)
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in on_it:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def ray_cluster(nodes: int, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[Nodes]:
    """A head that draws too, and so many nodes besides. One worker fits on each.

    ``environment``: of the workers. They have that of their node, which is started here, and not that of the driver.
    """
    wanted = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **environment}
    others = set(processes(RAYLET))  # of another cluster of this process, which several tests share
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK,
    }  # fmt: skip
    with started_lean():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        deadline = time.monotonic() + 60
        while (left := set(processes(RAYLET)) - others) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"raylets are left: {left}"


def processes(words: str, below: int | None = None) -> list[int]:
    """Living descendants of a process, of this one if none is named, whose command line holds ``words``."""
    root = os.getpid() if below is None else below
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            pid = int(stat.parent.name)
            parents[pid] = int(parent)
            if state != "Z" and words.encode() in (stat.parent / "cmdline").read_bytes():
                found.append(pid)
    return [pid for pid in found if _descends(pid, root, parents)]


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == root:
            return True
    return False


def workers() -> list[int]:
    """Processes of workers, whatever they do."""
    return sorted(processes("ray::Drawer"))


def drawing() -> int:
    """How many workers have been given a batch: the death of such a one is one that the driver knows of."""
    return len({pid for call in ("draw", "collect") for pid in processes(f"ray::Drawer.{call}")})


def kill_a_worker(rng: random.Random) -> None:
    """Kill one of them, and wait for one where there is none."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if found := workers():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile: that was no kill
                os.kill(rng.choice(found), signal.SIGKILL)
                return
        time.sleep(0.005)
    raise AssertionError("no worker in 600 s")
