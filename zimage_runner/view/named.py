"""The folder that a word of a command line names."""

from __future__ import annotations

import os

LATEST = "latest"


def named(word: str) -> str:
    """Return the folder; ``latest`` is the run or multirun below outputs/ that was started last. Raises UserError."""
    if word != LATEST:
        return os.path.expanduser(word)
    from zimage_runner.cli.resume.command_line import folder_named  # it imports Hydra, which looking at runs needs not

    return str(folder_named(word))
