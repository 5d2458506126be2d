"""Workers as actors of Ray Core. The only module that imports Ray."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from zimage_runner.errors import UserError, one_line
from zimage_runner.executors.base import Batch, Sink
from zimage_runner.executors.fleet import Died, Event, Hired, Notice, Ready, Refused, Stopped
from zimage_runner.executors.messages import Start
from zimage_runner.executors.ray_actor import Answer, Drawer, Drawn, Identity, differences, software
from zimage_runner.executors.ray_options import AUTO, RayOptions
from zimage_runner.executors.ray_start import check_address, own_signals, quiet, started_lean
from zimage_runner.plan import Encoding

if TYPE_CHECKING:
    from zimage_runner.warmup import WarmupShape

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often the cluster is asked for its nodes."""


@dataclass(slots=True)
class _Actor:
    handle: Any
    node_id: str = ""
    refs: dict[Any, int] = field(default_factory=dict)
    """What is being waited for -> ticket, 0 of what is no batch."""
    draws: dict[int, Any] = field(default_factory=dict)
    """Ticket -> the call of ``draw``, of batches that are not collected."""


class RayFleet:
    """Fleet (see fleet.py) on a Ray cluster, one of this machine's own where no address is given."""

    def __init__(self, config: RayOptions, start: Start, *, uses_gpu: bool) -> None:
        self._config = config
        self._start = start
        self._uses_gpu = uses_gpu
        self._actors: dict[int, _Actor] = {}
        self._waiting: dict[Any, int] = {}
        """Every call that is waited for -> its worker."""
        self._owns_ray = False
        self._start_ref: Any = None
        self._sink: tuple[Sink, Any] | None = None
        self._nodes: list[dict[str, Any]] = []
        self._looked = 0.0
        self._demand: dict[str, Any] = {}

    def connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            with quiet(self._config.verbose), own_signals():
                self._init()
            self._owns_ray = True
        self._here = ray.get_runtime_context().get_node_id()
        self._demand = self._ask_for()
        groups = {"draw": 1, "collect": 1}
        remote: Any = ray.remote  # its types know no concurrency groups
        self._class = remote(concurrency_groups=groups, max_restarts=0, max_task_retries=0)(Drawer)
        self._start_ref = ray.put(self._start)

    def _init(self) -> None:
        options: dict[str, Any] = {"log_to_driver": self._config.verbose, "namespace": f"zimage_runner_{os.getpid()}"}
        start = contextlib.nullcontext()
        if self._config.address is None:
            start = started_lean()
            options |= {"address": "local", "include_dashboard": False}
            # Ray would start workers at niceness 15: the thread that feeds a GPU would wait for everybody else's.
            os.environ.setdefault("RAY_worker_niceness", "0")
            if self._config.object_store_gb is not None:
                options["object_store_memory"] = int(self._config.object_store_gb * 1e9)
        else:
            options["address"] = self._config.address
            check_address(self._config.address)
        try:
            with start:
                ray.init(**options, configure_logging=self._config.verbose)
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
            where = "started here" if self._config.address is None else f"reached at {self._config.address}"
            raise UserError(
                f"executor=ray: Ray cannot be {where} ({one_line(str(error), 300)}): see `ray status` for "
                "executor.address, and free some of /dev/shm and /tmp for a Ray of this machine's own"
            ) from None

    def _ask_for(self) -> dict[str, Any]:
        """Return what each worker asks of a node, by Ray's names of resources."""
        config, nodes = self._config, self._living()
        has_gpus = any(node["Resources"].get("GPU", 0) > 0 for node in nodes)
        gpus = config.num_gpus if config.num_gpus != AUTO else float(has_gpus and self._uses_gpu)
        cpus = config.num_cpus
        if cpus == AUTO:
            all_of_one = min((n["Resources"]["CPU"] for n in nodes if n["Resources"].get("CPU")), default=1.0)
            cpus = 1.0 if gpus else all_of_one
        return {"CPU": cpus, "GPU": gpus, **config.resources}

    def _living(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        if now - self._looked > LOOK_S or not self._nodes:
            self._looked, self._nodes = now, [node for node in ray.nodes() if node["Alive"]]
        return self._nodes

    def places(self) -> int:
        return sum(self._room(node["Resources"]) for node in self._living()) if self._demand["GPU"] else self._few()

    def _room(self, has: dict[str, float]) -> int:
        return int(min(has.get(name, 0.0) / amount + 1e-9 for name, amount in self._demand.items() if amount))

    def _few(self) -> int:
        """Without GPUs: one worker a cluster, for one uses all cores; as many as fit where a demand is named."""
        fitting = [self._room(node["Resources"]) for node in self._living()] if any(self._demand.values()) else [1]
        named = self._config.num_cpus != AUTO or self._config.resources
        return sum(fitting) if named else min(1, sum(fitting))

    def hire(self, worker: int) -> None:
        demand = self._demand
        resources = {name: amount for name, amount in self._config.resources.items() if amount}
        options = {"num_cpus": demand["CPU"], "num_gpus": demand["GPU"], "resources": resources}
        actor = self._actors[worker] = _Actor(self._class.options(**options).remote(worker))
        self._expect(worker, actor, actor.handle.hello.remote())

    def load(self, worker: int) -> None:
        actor = self._actors[worker]
        self._expect(worker, actor, self._in_order(actor).start.remote(self._start_ref))

    def extend(self, worker: int, shapes: Sequence[WarmupShape], texts: Sequence[Encoding]) -> None:
        actor = self._actors[worker]
        self._expect(worker, actor, self._in_order(actor).extend.remote(shapes, texts))

    def equip(self, worker: int, sink: Sink | None, *, must: bool) -> None:
        if sink is not None and (self._sink is None or self._sink[0] is not sink):
            self._sink = (sink, ray.put(sink))
        ref = self._sink[1] if sink is not None and self._sink is not None else None
        self._in_order(self._actors[worker]).equip.remote(ref, must)

    def draw(self, worker: int, ticket: int, batch: Batch) -> None:
        actor = self._actors[worker]
        actor.draws[ticket] = self._in_order(actor).draw.remote(ticket, batch)
        collect = actor.handle.collect.options(concurrency_group="collect")
        self._expect(worker, actor, collect.remote(ticket), ticket)

    @staticmethod
    def _in_order(actor: _Actor) -> Any:
        return _InOrder(actor.handle)

    def _expect(self, worker: int, actor: _Actor, ref: Any, ticket: int = 0) -> None:
        actor.refs[ref] = ticket
        self._waiting[ref] = worker

    def poll(self, timeout_s: float) -> list[Notice]:
        if not self._waiting:
            time.sleep(min(timeout_s, 0.1))
            return []
        ready, rest = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return [Notice(self._waiting[ref], functools.partial(self._fetch, ref)) for ref in ready]

    def _fetch(self, ref: Any) -> Event:
        worker = self._waiting.pop(ref)
        actor = self._actors[worker]
        ticket = actor.refs.pop(ref)
        try:
            value: Any = ray.get(ref)
        except ray.exceptions.RayError as error:
            return self._died(worker, actor, ticket, error)
        if isinstance(value, Identity):
            return self._hired(actor, value)
        for level, logger, text in value.lines:
            logging.getLogger(logger).log(level, "%s", text)
        if value.broken is not None:
            return self._died(worker, actor, ticket, None, value.broken)
        if isinstance(value, Answer):
            return Ready(report=value.report) if value.refused is None else Refused(message=value.refused)
        assert isinstance(value, Drawn)
        actor.draws.pop(ticket, None)
        if value.stopped is not None:
            return Stopped(message=value.stopped)
        assert value.done is not None
        return value.done

    def _hired(self, actor: _Actor, identity: Identity) -> Event:
        wrong = differences(software(), identity.software)
        if wrong:
            return Refused(message=f"{identity.node} has other software than this machine ({'; '.join(wrong)}): "
                           "install the same versions on every node")  # fmt: skip
        actor.node_id = identity.node_id
        return Hired(node=identity.node, is_elsewhere=actor.node_id != self._here)

    def _died(self, worker: int, actor: _Actor, ticket: int, error: Any, broken: str | None = None) -> Died:
        """What a call's failure says about its worker, which is ended if it lives."""
        started = self._launched(actor)
        if ticket:
            started |= set() if started else {ticket}
        self.fire(worker)
        if error is None:
            return Died(how=f"ended: {broken}", started=frozenset(started), broken=True)
        return Died(how=_how(error), started=frozenset(started), blameless=self._is_blameless(actor, error))

    def _launched(self, actor: _Actor) -> set[int]:
        """Tickets of the batches that the device has or had: all whose ``draw`` has returned, and the one after."""
        found: set[int] = set()
        for ticket, ref in sorted(actor.draws.items()):
            found.add(ticket)
            try:
                ray.get(ref, timeout=0)
            except (ray.exceptions.RayError, TimeoutError):
                break
        return found

    def _is_blameless(self, actor: _Actor, error: Any) -> bool:
        """Whether no item can have caused this: the node failed, or the way there, or pictures were lost."""
        if not isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
            return not isinstance(error, ray.exceptions.OutOfMemoryError)
        if isinstance(error, ray.exceptions.ActorUnavailableError) or "node has died" in str(error):
            return True
        self._looked = 0.0
        return bool(actor.node_id) and all(node["NodeID"] != actor.node_id for node in self._living())

    def fire(self, worker: int) -> None:
        actor = self._actors.pop(worker)
        for ref in actor.refs:
            self._waiting.pop(ref, None)
        with contextlib.suppress(Exception):
            ray.kill(actor.handle, no_restart=True)

    def describe(self) -> str:
        asked = ", ".join(f"{name}: {amount:g}" for name, amount in self._demand.items() if amount)
        nodes = [
            ", ".join(f"{name}: {node['Resources'].get(name, 0):g}" for name, amount in self._demand.items() if amount)
            for node in self._living()
        ]
        return f"a worker asks for {asked or 'nothing'}; the nodes have {' | '.join(nodes[:8]) or 'nothing'}"

    def close(self) -> None:
        for worker in list(self._actors):
            self.fire(worker)
        self._sink = self._start_ref = None
        if self._owns_ray:
            with quiet(self._config.verbose), own_signals():
                ray.shutdown()
            self._owns_ray = False


class _InOrder:
    """Calls of an actor that run one after the other, in its drawing thread."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name).options(concurrency_group="draw")


def _how(error: Any) -> str:
    """How a worker ended, in a few words."""
    text = str(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "was ended by Ray, because its node was short of memory"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "cannot be reached"
    if "node has died" in text:
        return "is gone with its node"
    if isinstance(error, ray.exceptions.RayActorError):
        detail = text.rpartition("Worker exit detail:")[2].strip().partition(". ")[0]
        return f"died ({one_line(detail or text, 200)})"
    return f"lost its results ({one_line(f'{type(error).__name__}: {text}', 200)})"
