"""The configs of a sweep's jobs, as Hydra gives them.

Hydra composes each from its files anew, twice (once to check it), 2 x 70 ms a job. Jobs that differ in values alone
start here from one composed config; only another choice of config groups is composed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from zimage_runner.cli.hydra_patches import Kept, apply_overrides, directory_name, parse_override

KEPT = 10_000
"""Configs made for the check and not asked for again; about 100 KB each."""


class SweepComposer:
    """Stands in for ``ConfigLoader.load_sweep_config`` and gives the same configs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._compose = loader.load_sweep_config
        self._bases: dict[tuple[str, ...], Kept] = {}
        self._made: dict[tuple[str, ...], list[DictConfig]] = {}
        self._count = 0

    def __call__(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """The config of one job; its values are independent of every other job's."""
        config = self._new(master_config, sweep_overrides)
        if self._count < KEPT:
            self._count += 1
            self._made.setdefault(tuple(sweep_overrides), []).append(config)
        return config

    def take(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """As a call, but takes what the sweeper's check has made already, each only once."""
        made = self._made.get(tuple(sweep_overrides))
        return made.pop() if made else self._new(master_config, sweep_overrides)

    def _new(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        parsed = [parse_override(text) for text in sweep_overrides]
        values = [override for override in parsed if self._is_value(override)]
        choices = [override for override in parsed if not self._is_value(override)]
        key = tuple(override.input_line or "" for override in choices)
        if key not in self._bases:
            self._bases[key] = Kept(self._compose(master_config, list(key)))
        config = self._bases[key].new()
        apply_overrides(values, config)
        tasks = [override for override in parsed if not override.is_hydra_override()]
        config.hydra.overrides.task = [override.input_line for override in tasks]
        config.hydra.job.override_dirname = directory_name(tasks, config)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _is_value(self, override: Override) -> bool:
        """True for ``field=value``: applied last, to a config that is composed already."""
        changes_field = not (override.is_delete() or override.is_add() or override.is_force_add() or override.package)
        return changes_field and not override.is_hydra_override() and not self._is_group(override.key_or_group)

    def _is_group(self, key: str) -> bool:
        return self._loader.repository.group_exists(config_path=key)


def compose_quickly(loader: ConfigLoader) -> SweepComposer:
    """Make this loader compose sweep jobs with the SweepComposer that is returned."""
    composer = SweepComposer(loader)
    loader.load_sweep_config = composer  # pyright: ignore[reportAttributeAccessIssue]
    return composer
