"""``resume=DIR`` of a whole multirun: its own command line again, each job continued where it stopped.

The sweep's overrides give the same jobs with the same numbers, so that a number's directory tells what became of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from zimage_runner.cli.foreign import is_data
from zimage_runner.cli.interpolation import looks_up
from zimage_runner.cli.quoting import hydra_quote
from zimage_runner.cli.resume.saved import (
    SETTINGS,
    config_dirs,
    is_own,
    override_key,
    read_yaml,
    tell_what_is_left_out,
    texts,
    with_choices,
    without_replaced,
)
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.beneath import Inside

SWEEP = "multirun.yaml"
FIRST = ".hydra/multirun.yaml"
"""The same as it was at first: Hydra writes multirun.yaml anew whenever the multirun is resumed."""
OWN_HYDRA = ("hydra.mode", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher")
"""Overrides of the first command line that this one gives anew: jobs run here, one after the other."""


def is_sweep(directory: Path) -> bool:
    """True for the directory of a multirun, not for one of its jobs."""
    return Inside(directory, SWEEP).is_file() and not os.path.lexists(directory / SETTINGS)


def settings_file(directory: Path) -> Path | None:
    """What a multirun wrote when it began; None for one that began no job, and for what is none."""
    if not is_sweep(directory) or not _began_a_job(directory):
        return None
    return directory / (FIRST if (directory / FIRST).is_file() else SWEEP)


def _began_a_job(directory: Path) -> bool:
    return any(any(directory.glob(f"{job}/{SETTINGS}")) for job in ("*", "*/*"))  # hydra.sweep.subdir may be two


def empty_if_unbegun(directory: Path, *, is_new: bool) -> None:
    """Remove what a multirun that began no job has left in its folder. ``is_new``: the folder was not there before."""
    if not is_sweep(directory) or _began_a_job(directory):
        return
    own = (directory / SWEEP, (directory / FIRST).parent)
    with contextlib.suppress(OSError):  # something else is there
        for path in set(directory.iterdir()) - {*own} if is_new else ():
            path.rmdir()
        own[0].unlink()
        shutil.rmtree(own[1], ignore_errors=True)


def check_resumable(directory: Path) -> None:
    """Raise UserError for a multirun whose jobs have to be resumed one by one."""
    _settings(directory)


def _settings(directory: Path) -> Any:
    settings = read_yaml(directory, FIRST if (directory / FIRST).is_file() else SWEEP)
    sweeper = str(_entry(directory, settings, "sweeper", "_target_"))
    if not sweeper.endswith(".BasicSweeper"):
        raise UserError(
            f"resume={directory}: its jobs were chosen by {sweeper.rpartition('.')[2]}, which cannot be asked for the "
            f"same ones again: resume its jobs one by one, {directory}/0 ..."
        )
    _entry(directory, settings, "runtime")
    _entry(directory, settings, "overrides")
    return settings


def multirun_overrides(directory: Path) -> list[str]:
    """What the multirun was started with, but for Hydra's own settings. Raises UserError."""
    return texts(directory, SWEEP, _entry(directory, _settings(directory), "overrides", "task"))


def sweep_command_line(directory: Path, others: Sequence[str]) -> list[str]:
    """The multirun's command line with ``others`` in place of what they change. Raises UserError."""
    for name in os.listdir(directory):
        if name.isdigit() and os.path.islink(directory / name):
            raise UserError(f"resume={directory}: {name} is a link: put the job's own folder there, or remove it")
    settings = _settings(directory)
    runtime = _entry(directory, settings, "runtime")
    task = multirun_overrides(directory)
    hydra = texts(directory, SWEEP, _entry(directory, settings, "overrides", "hydra"))
    hydra = [text for text in hydra if not override_key(text).startswith(OWN_HYDRA)]
    taken = [text for text in hydra if _is_data(text)]
    left_out = [text for text in task if not is_own(text)] + [text for text in hydra if text not in taken]
    tell_what_is_left_out(directory, left_out)
    mine = {override_key(text) for text in others}
    saved = without_replaced(with_choices(directory, SWEEP, task, runtime), others)
    kept = [text for text in [*saved, *taken] if override_key(text) not in mine]
    if asked := next((text for text in kept if looks_up(text)), None):
        raise UserError(
            f"resume={directory}: its {asked} would be looked up again, and a saved run is not asked to: "
            f"give {override_key(asked)}=... on the command line"
        )
    quoted = hydra_quote(str(directory))
    return [
        "-m", *config_dirs(directory, runtime, others), *_config_name(directory, settings, others), *kept,
        *(text for text in others if text not in ("-m", "--multirun")),
        "hydra/launcher=warm", f"hydra.sweep.dir={quoted}", f"resume={quoted}",
    ]  # fmt: skip


def _config_name(directory: Path, settings: Any, others: Sequence[str]) -> list[str]:
    """--config-name of a config of the user's own, unless given again."""
    name = str(_entry(directory, settings, "job", "config_name"))
    given = any(word.startswith(("--config-n", "-cn")) for word in others)
    own = name != "config" and re.fullmatch(r"[\w-]+", name)
    return [f"--config-name={name}"] if own and not given else []


def _is_data(override: str) -> bool:
    """Whether a saved override of Hydra's settings is a mere value, and leads no job out of the multirun's folder."""
    key, value = override_key(override), override.partition("=")[2].strip("\"'")
    leads_out = key == "hydra.sweep.subdir" and (value.startswith("/") or ".." in value.split("/"))
    return is_data(key, value) and not leads_out


def keep_first_settings(directory: Path) -> None:
    """Called when a multirun begins; of a sweeper that comes with several batches, the first one's are kept."""
    if (directory / SWEEP).is_file() and not (directory / FIRST).exists():
        with atomic.directory(directory) as folder:
            beneath.make_dirs(folder, str(PurePosixPath(FIRST).parent))
            atomic.write_file(folder, FIRST, Inside(directory, SWEEP).read_bytes())


def job_to_resume(job_directory: Path) -> str | None:
    """What ``resume`` is for a job of a multirun that is resumed; None for one that was never begun."""
    return str(job_directory) if os.path.lexists(job_directory / SETTINGS) else None


def _entry(directory: Path, settings: Any, *names: str) -> Any:
    for name in ("hydra", *names):
        if not isinstance(settings, dict) or name not in settings:
            raise UserError(f"resume={directory}: {SWEEP} has no {name}: resume its jobs one by one, {directory}/0 ...")
        settings = settings[name]
    return settings
