"""Config files of others are data: whatever lies outside the package's own ``conf/`` names no code.

Hydra makes objects of all it finds in ``hydra.callbacks``, ``hydra.launcher``, ``hydra.sweeper`` and the logging
settings, as soon as a config is composed, also for ``dry_run``. So each file is looked at when it is read, before
anything is composed of it. What is typed on the command line, and packages that are installed, are trusted.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from zimage_runner.cli.hydra_patches import files_are_read_by, files_pass, primary_file_passes
from zimage_runner.cli.interpolation import looks_up
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import UserError, error_text
from zimage_runner.outputs.parsed import CONSTRUCTORS_RAISE, check_yaml

TRUST = "--trust-code"
"""The word on the command line that lets the config files named there set anything."""
DATA_OF_HYDRA = (
    "hydra.mode",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.name",
    "hydra.job.chdir",
    "hydra.verbose",
    "hydra.sweeper.max_batch_size",
    "hydra.launcher.keep_going",
    "hydra.callbacks.sweep_report.grid",
    "hydra.callbacks.sweep_report.tile",
)
"""What a config file or a saved run may say of Hydra, besides ``hydra.sweeper.params``."""
LARGEST = 32 << 20
"""Bytes of a config file. Hydra's parser takes a minute for them."""
SWEPT = "hydra.sweeper.params."
MADE_INTO_OBJECTS = ("hydra.callbacks.", "hydra.launcher.", "hydra.sweeper.")
"""Settings whose values Hydra resolves first: an interpolation could put a mapping with a ``_target_`` there."""
_OVERRIDE_KEY = re.compile(r"[+~]{0,2}[\w./@:]+", re.ASCII)


def is_data(key: str, value: Any) -> bool:
    """Whether a setting ``hydra...`` is a value only, and cannot make Hydra import, call or read anything."""
    if isinstance(value, dict) or (isinstance(value, list) and not key.startswith(SWEPT)):
        return False
    if key.startswith(MADE_INTO_OBJECTS) and re.search(r"[${}]", str(value)):
        return False
    return key in DATA_OF_HYDRA or (key.startswith(SWEPT) and names_own_field(key.removeprefix(SWEPT)))


def names_own_field(key: str) -> bool:
    """Whether the key of an override is one of a field or group, not of Hydra's."""
    return _OVERRIDE_KEY.fullmatch(key) is not None and "hydra" not in key and "_target_" not in key


@contextlib.contextmanager
def files_are_data(*, trusted: bool, own: bool) -> Iterator[None]:
    """Hydra composes nothing of a file that names code: UserError. ``trusted`` lets all through.

    ``own`` is False where a saved run names the folder: nothing of its files is looked up in the environment either.
    """
    if trusted:
        yield
        return

    def read(root: str, config_path: str, as_ever: Callable[[], ConfigResult]) -> ConfigResult:
        _check_text(root, config_path)
        try:
            return as_ever()
        except UnicodeDecodeError:
            raise
        except (ValueError, *CONSTRUCTORS_RAISE) as error:
            raise UserError(f"{_file_name(config_path)}: not readable as YAML: {error_text(error)}") from None

    def checked(result: ConfigResult, default: ResultDefault) -> ConfigResult:
        _check(result, default.config_path or "", own)
        return result

    with files_are_read_by(read), files_pass(checked), primary_file_passes(lambda file, name: _check(file, name, own)):
        yield


def _check_text(root: str, config_path: str) -> None:
    """Raise UserError for a file of others that the parser would die of, or not come to an end with."""
    file = Path(os.path.realpath(os.path.join(root, _file_name(config_path))))
    if file.is_relative_to(CONFIG_DIR):
        return
    try:
        with open(file, "rb") as stream:
            text = stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"larger than {LARGEST:,} bytes: put prompts in a file of their own (prompts.path)")
        check_yaml(text)
    except (OSError, yaml.YAMLError):
        return  # Hydra says what is wrong
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _check(result: ConfigResult, config_path: str, own: bool) -> None:
    file = foreign_file(result, config_path)
    if file is None:
        return
    remedy = f"remove it, or add {TRUST} to the command line if you trust whoever wrote the file"
    for key, value in _leaves(OmegaConf.to_container(result.config, resolve=False)):
        if "_target_" in key.split("."):
            raise UserError(f"{file}: {key}: names code to run, and a config file is data: {remedy}")
        if key.partition(".")[0] == "hydra" and not is_data(key, value):
            raise UserError(
                f"{file}: {key}: a config file cannot set this, because Hydra may run code for it: give it on the "
                f"command line, {remedy}"
            )
        if not own and isinstance(value, str) and looks_up(value):
            raise UserError(
                f"{file}: {key}={value}: a saved run named this file, so nothing is looked up for it: "
                "give --config-dir yourself if the folder is yours"
            )


def foreign_file(result: ConfigResult, config_path: str) -> str | None:
    """The file's name if it is not of the package or of one that is installed."""
    scheme, _, root = result.path.partition("://")
    leaves_its_source = config_path.startswith("/") or ".." in config_path.split("/")
    if scheme != "file":
        return config_path if leaves_its_source else None
    path = Path(os.path.realpath(os.path.join(root, _file_name(config_path))))
    return None if path.is_relative_to(CONFIG_DIR) else str(path)


def _file_name(config_path: str) -> str:
    return config_path if config_path.endswith((".yaml", ".yml")) else f"{config_path}.yaml"


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that is no mapping; of lists only what is no mapping either."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{prefix}.{number}")
    elif isinstance(value, list):
        yield prefix, value
        yield from ((prefix, entry) for entry in value if isinstance(entry, str) and not prefix.startswith("hydra"))
    else:
        yield prefix, value
