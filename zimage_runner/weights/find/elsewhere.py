"""The checkpoint of a run on another machine than the one that planned it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import replace

from zimage_runner.errors import UserError
from zimage_runner.model import Model
from zimage_runner.weights.cache import cache_root
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.digest import weights_digest
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import resolve


def on_this_machine(model: Model, checkpoint: Checkpoint) -> Checkpoint:
    """Return the same weights where this machine has them: at the same path, or found or downloaded as ``model`` says.

    Processes of one machine do this one after the other, so that one of them downloads. Raises UserError where the
    weights are others.
    """
    with _one_at_a_time():
        with contextlib.suppress(UserError, OSError):
            same = weights_digest(inspect(checkpoint.path)) == checkpoint.digest
            if same and (checkpoint.controlnet is None or _digest(resolve(model)) == _digest(checkpoint)):
                return checkpoint
        found = resolve(model)
    if _digest(found) != _digest(checkpoint):
        raise UserError(
            f"model.controlnet={model.controlnet} on this node is another file than on the machine that was asked: "
            "copy the same one to every node"
        )
    if found.digest != checkpoint.digest:
        raise UserError(
            f"{found.path} on this node holds other weights (digest {found.digest[:12]}) than the machine that was "
            f"asked (digest {checkpoint.digest[:12]}): copy the same files to every node, or pin model.revision"
        )
    return replace(found, revision=checkpoint.revision)  # it goes into records, which are alike wherever they are drawn


def _digest(checkpoint: Checkpoint) -> str | None:
    return checkpoint.controlnet and checkpoint.controlnet.digest


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "weights_of_a_cluster.lock").open("wb")
    except OSError:  # no cache: each process looks for itself, as it would without the others
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
