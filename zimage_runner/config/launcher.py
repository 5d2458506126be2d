"""Fields of ``hydra.launcher`` for the launcher of this program."""

from __future__ import annotations

from dataclasses import dataclass

PLUGIN_MODULE = "hydra_plugins.zimage_runner"
"""Hydra takes plugins only from below this package. A real one would be imported by every Hydra program of the
environment, so ours is made in memory."""


@dataclass(kw_only=True, slots=True)
class WarmLauncherConfig:
    """``hydra/launcher=warm``: all jobs in this process, sharing sessions."""

    _target_: str = f"{PLUGIN_MODULE}.WarmLauncher"
    keep_going: bool = True
    """A failed job does not keep the others from running; the exit code tells."""
