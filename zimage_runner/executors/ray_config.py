"""``executor=ray``: one warm session in each of many workers, on the GPUs of a machine or of a cluster."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError
from zimage_runner.executors.base import Executor, SessionFactory
from zimage_runner.executors.messages import Start
from zimage_runner.executors.ray_options import RayOptions
from zimage_runner.memory.policies import Auto, Health
from zimage_runner.signals import StopRequest

if TYPE_CHECKING:
    from zimage_runner.session import SessionConfig


@dataclass(kw_only=True, slots=True)
class RayExecutorConfig(RayOptions):
    """One warm session in each of many workers, on the GPUs of this machine or of a Ray cluster."""

    def adapt(self, session: SessionConfig) -> SessionConfig:
        """A large worker is replaced as a whole, so its session need not do it; each node has its own weights.

        Where several share a GPU, ``memory=auto`` takes what fits into a worker's share.
        """
        session = replace(RayOptions.adapt(self, session), may_be_elsewhere=True)
        memory = session.memory
        if self.shares_gpu and isinstance(memory, Auto) and memory.per_process_fraction is None:
            session = replace(session, memory=replace(memory, per_process_fraction=float(self.num_gpus)))
        return session

    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        if importlib.util.find_spec("ray") is None:
            raise UserError("executor=ray needs Ray, which is not installed: pip install 'zimage-runner[ray]'")
        from zimage_runner.executors.ray_fleet import RayFleet
        from zimage_runner.executors.ray_pool import RayExecutor

        folder = os.path.abspath(os.curdir)
        fleet = RayFleet(self, Start(make_session, auto_batch, folder), uses_gpu=_may_use_gpu(make_session))
        return RayExecutor(
            self,
            fleet,
            Health() if health is None else health,
            StopRequest() if stop is None else stop,  # not "or": an unset request is false
        )


def _may_use_gpu(make_session: Any) -> bool:
    """Whether the session may want a GPU: all do, but those of ``engine.device=cpu``."""
    engines = (getattr(argument, "engine", None) for argument in getattr(make_session, "args", ()))
    devices = (getattr(engine, "device", None) for engine in engines)
    return all(getattr(device, "value", "auto") != "cpu" for device in devices)
