"""``executor=resident``: the command line hands its run to a process that stays, with the model warm in it.

What hands over and what stays is in ``zimage_runner/resident``. In the process that stays, this is ``executor=inline``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zimage_runner.errors import UserError, check_range
from zimage_runner.executors.base import Executor, SessionFactory
from zimage_runner.executors.handing import is_resident
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.memory.policies import Health
from zimage_runner.signals import StopRequest

IDLE_MINUTES = 15.0


@dataclass(kw_only=True, slots=True)
class ResidentExecutorConfig(InlineExecutorConfig):
    """A process of this user's that keeps the model warm between commands; otherwise as inline."""

    idle_minutes: float = field(default=IDLE_MINUTES, repr=False)  # no part of what makes two executors the same
    """Minutes without a run after which the process ends and gives its memory back."""

    def __post_init__(self) -> None:
        InlineExecutorConfig.__post_init__(self)
        check_range("executor.idle_minutes", self.idle_minutes, 0, 100_000)

    def create(
        self,
        make_session: SessionFactory,
        *,
        auto_batch: bool = False,
        health: Health | None = None,
        stop: StopRequest | None = None,
    ) -> Executor:
        if not is_resident():
            raise UserError(
                "executor=resident is of the command line, which hands its run to another process: use executor=inline "
                "here"
            )
        return InlineExecutorConfig.create(self, make_session, auto_batch=auto_batch, health=health, stop=stop)
