"""Real Ray on this machine: a cluster of several nodes, small, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORE = 100 * 2**20
"""Bytes of each node's object store."""
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
        """End a node as a machine ends whose power is cut."""
        self._cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[Nodes]:
    """A head that draws too, and so many nodes besides. One worker fits on each."""
    wanted = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        deadline = time.monotonic() + 60
        while (left := processes("raylet/raylet")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"raylets are left: {left}"


def processes(words: str) -> list[int]:
    """Living processes of this one's descendants whose command line holds ``words``."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            pid = int(stat.parent.name)
            parents[pid] = int(parent)
            if state != "Z" and words.encode() in (stat.parent / "cmdline").read_bytes():
                found.append(pid)
    return [pid for pid in found if _descends(pid, parents)]


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def workers() -> list[int]:
    """Processes of workers that draw."""
    return sorted(processes("ray::Drawer"))
