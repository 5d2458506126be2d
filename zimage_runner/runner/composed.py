"""A composed and validated config on its way into a run, and its directory where nothing comes of it. No Hydra."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_runner.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Composed:
    """All that one job needs of Hydra, as plain data."""

    config: RunConfig
    directory: Path
    """The run directory, which Hydra has made."""
    files: dict[str, str]
    """Name and text of each file of the run's ``.hydra`` folder."""

    def remove_unused_directory(self) -> None:
        """Leave no run directory behind when nothing was written into it."""
        remove_if_empty(self.directory, Path(self.config.output.root))


def remove_if_empty(directory: Path, root: Path) -> None:
    """Hydra makes the run directory before the config is validated; leave none behind when nothing ran."""
    for folder in (directory, *directory.parents):
        if not folder.is_relative_to(root.absolute()) or (folder == root and root.is_absolute()):
            return
        try:
            folder.rmdir()
        except OSError:
            return


def remove_with_name(directory: Path) -> None:
    """For a signal that ends the process: the run directory and the folder of the run's name, where empty."""
    with contextlib.suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()
