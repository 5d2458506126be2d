"""Pictures written by the workers that drew them, where these share the storage with the run's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import BadPictureError, error_text
from zimage_runner.executors.base import Written
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import Fsync, Output
from zimage_runner.outputs.item_files import ItemFiles, WriteRequest, files_of
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.plan import Fingerprints, WorkItem
from zimage_runner.runner.spec import Recipe

if TYPE_CHECKING:
    import numpy as np


@dataclass(kw_only=True, slots=True)
class WorkerSink:
    """See ``executors.base.Sink``. Crosses to each worker as its fields; what it opens stays there."""

    directory: str
    """Of the run: a whole path."""
    token: str
    """What the run directory's token file holds."""
    output: Output
    recipe: Recipe
    report: Mapping[str, Any]
    """numerics and versions, for the recipes."""
    output_file: str | None
    thumbnails: bool
    _run_dir: RunDirectory | None = field(default=None, init=False, repr=False)
    _files: ItemFiles | None = field(default=None, init=False, repr=False)
    _fingerprints: Fingerprints | None = field(default=None, init=False, repr=False)

    def open(self) -> None:
        """Open the run directory. Raises UserError where this machine does not see it."""
        self._run_dir = RunDirectory.join(self.directory, self.token)
        output = self.output
        if output.fsync is Fsync.run:  # at the run's end nobody else can force to disk what this machine wrote
            output = replace(output, fsync=Fsync.item)
        self._files = files_of(self._run_dir, output, thumbnails=self.thumbnails)
        self._fingerprints = Fingerprints(str(self.recipe.model["digest"]), self.report["numerics"])

    def write(
        self, items: Sequence[WorkItem], pixels: np.ndarray, details: dict[str, Any], attempt: int
    ) -> list[Written]:
        """Write the items' files. Raises DiskError."""
        assert self._run_dir is not None
        self._run_dir.check_free(self.output)
        return [self._write(item, picture, {**details, "attempt": attempt}) for item, picture in zip(items, pixels)]

    def _write(self, item: WorkItem, picture: np.ndarray, details: dict[str, Any]) -> Written:
        assert self._run_dir is not None
        assert self._files is not None
        assert self._fingerprints is not None
        request = WriteRequest(
            item_dir=item.item_dir,
            index=item.prompt_index,
            seed=item.seed,
            fingerprint=self._fingerprints(item),
            recipe=self.recipe(item, self.report),
            details=details,
            output_file=self.output_file,
        )
        seconds = sum(details.get("timings", {}).values())
        try:
            filed = self._files.picture(request, picture, seconds)
        except BadPictureError as error:
            return Written(status="bad", error=error_text(error))
        except OSError as error:
            raise atomic.disk_error(error, str(self._run_dir.path / item.item_dir)) from error
        return Written(status=filed.status, line=filed.line, error=filed.error)
