"""The session of a service: many wait for it, so no single request may end it. Light, as worker processes import it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from zimage_runner.engines.base import GeneratedBatch
from zimage_runner.errors import UserError
from zimage_runner.sampling import ANY_PICTURE, Inputs
from zimage_runner.session import Session

if TYPE_CHECKING:
    from zimage_runner.plan import WorkItem
    from zimage_runner.warmup import WarmupShape

log = logging.getLogger(__name__)


class Refused(RuntimeError):
    """Something that this model cannot draw: an error of the items alone."""


class ServedSession(Session):
    """Takes what ``Session`` refuses once it is loaded for an error of the items, and is warm for pictures too."""

    def warm_up(self, shapes: Sequence[WarmupShape]) -> None:
        """Also for requests that start from a picture, or follow one where there is a ControlNet."""
        super().warm_up(shapes)
        if self.config.warmup.generates:
            try:
                super().warm_up([self._with_picture(shape) for shape in shapes])
            except UserError as error:  # an engine, or weights, without an encoder for pictures
                log.info("not warm for pictures from pictures: %s", error)

    def _with_picture(self, shape: WarmupShape) -> WarmupShape:
        """A step of the same shape that starts from a picture, and follows it if it can."""
        control = ANY_PICTURE if self.config.model.controlnet else None
        inputs = Inputs(image=ANY_PICTURE, control_image=control)
        return replace(shape, params=replace(shape.params, inputs=inputs), whole=False)

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        try:
            return super().generate(items, attempt=attempt, tiled=tiled)
        except UserError as error:  # weights without an encoder for pictures, for example
            raise Refused(str(error)) from None
