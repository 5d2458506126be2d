"""The session of a service: many wait for it, so no single request may end it. Light, as worker processes import it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zimage_runner.engines.base import GeneratedBatch
from zimage_runner.errors import UserError
from zimage_runner.session import Session

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem


class Refused(RuntimeError):
    """Something that this model cannot draw: an error of the items alone."""


class ServedSession(Session):
    """Takes what ``Session`` refuses once it is loaded for an error of the items."""

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        try:
            return super().generate(items, attempt=attempt, tiled=tiled)
        except UserError as error:  # weights without an encoder for pictures, for example
            raise Refused(str(error)) from None
