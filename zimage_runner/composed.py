"""A composed and validated config on its way into a run, and the end of a command line that is refused. No Hydra."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import RunStopped, UserError, one_line

if TYPE_CHECKING:
    from zimage_runner.config.schema import RunConfig

EXIT_OK, EXIT_ITEMS_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class Later:
    """The exit code of a job whose last pictures are still on their way."""

    def __init__(self) -> None:
        self._code: int | None = None
        self._listeners: list[Callable[[int], object]] = []

    def then(self, listener: Callable[[int], object]) -> None:
        """Call it once the code is known."""
        if self._code is not None:
            listener(self._code)
        else:
            self._listeners.append(listener)

    def tell(self, code: int) -> None:
        """The code is known."""
        self._code = code
        for listener in self._listeners:
            listener(code)


def when_known(code: int | Later, listener: Callable[[int], object]) -> None:
    """Call ``listener`` with an exit code: now, or once it is known."""
    if isinstance(code, Later):
        code.then(listener)
    else:
        listener(code)


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


def execute(composed: Composed) -> int | Later:
    """Run it; the exit code, within a multirun perhaps later. What the user can mend is said in one line on stderr."""
    from zimage_runner.runner import run

    try:
        return run(composed.config, composed.directory, composed.files)
    except (UserError, RunStopped) as error:  # here and not in main: Hydra would print a line of its own
        return refuse(str(error))
    finally:
        composed.remove_unused_directory()


def refuse(message: str) -> int:
    """Say in one line why nothing was done; the exit code for it."""
    print(f"zimage_runner: {one_line(' '.join(message.split()))}", file=sys.stderr)
    return EXIT_BAD_INPUT


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
