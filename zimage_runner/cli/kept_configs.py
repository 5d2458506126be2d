"""Hydra composes as ever, but what it has read and merged of this package's own ``conf/`` is kept for the process.

For a process that composes again and again: the resident one, and the test suite. Everything else takes its usual way:
the command line, experiments, folders of others, checks, errors.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

from hydra._internal import defaults_list as defaults_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from zimage_runner.cli.hydra_patches import Kept
from zimage_runner.config.paths import CONFIG_DIR

OWN = (f"file://{CONFIG_DIR}", "pkg://hydra.conf", "structured://")
"""Sources whose content is the same for the whole process."""
BEGIN = ResultDefault(config_path="what was merged before")


def is_own(source: Any) -> bool:
    return f"{source.scheme()}://{source.path}" in OWN


class _Continues:
    """Stands in for the loader while a config is composed: begins with one that is merged already."""

    def __init__(self, loader: ConfigLoaderImpl, begin: Any) -> None:
        self._loader, self._begin = loader, begin

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        if default is BEGIN:
            return ConfigResult(provider="", path="", config=self._begin, header={})
        loaded = copy.copy(self._loader._load_single_config(default=default, repo=repo))
        loaded.config = copy.deepcopy(loaded.config)  # merging writes into it, and it is kept
        return loaded


@functools.cache
def keep_what_was_composed() -> None:
    """Call once, for the process."""
    load, compose = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
    map_choices, find = defaults_module._create_interpolation_map, ConfigRepository._find_object_source
    places: dict[tuple[str, Any], int | None] = {}
    results: dict[tuple[str, str], Any] = {}
    configs: dict[tuple[Any, ...], Kept] = {}

    def find_source(self: ConfigRepository, config_path: str, object_type: Any) -> Any:
        if not all(map(is_own, self.sources)):
            return find(self, config_path, object_type)
        key = (config_path, object_type)
        if key not in places:
            found = find(self, config_path, object_type)
            places[key] = None if found is None else self.sources.index(found)
        place = places[key]
        return None if place is None else self.sources[place]

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None or not is_own(source):
            return load(self, config_path)
        key = (source.scheme(), config_path)
        if key not in results:
            results[key] = load(self, config_path)
        return results[key]

    def is_kept(default: ResultDefault, repo: Any) -> bool:
        """Whether what this file says is the same for every command line."""
        loaded = repo.load_config(config_path=default.config_path)
        return loaded is not None and loaded.path in OWN and "experiment" not in str(default.config_path)

    def compose_config(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: Any) -> Any:
        first = list(itertools.takewhile(lambda default: is_kept(default, repo), defaults))
        key = tuple((d.config_path, d.parent, d.package, d.is_self, d.primary, d.override_key) for d in first)
        if key not in configs:
            begin: Any = _Continues(self, OmegaConf.create())
            kept = compose(begin, first, repo)
            OmegaConf.clear_cache(kept)  # a time that was looked up is not that of later command lines
            configs[key] = Kept(kept)
        config = configs[key].new()
        rest = defaults[len(first) :]
        if not rest:
            return config
        continues: Any = _Continues(self, config)
        return compose(continues, [BEGIN, *rest], repo)

    def new_repository(self: CachingConfigRepository, delegate: Any) -> None:
        self.delegate = copy.copy(delegate)  # Hydra copies every schema with it, and replaces its list of sources alone
        self.cache = {}

    def map_choices_if_needed(overrides: Any, defaults_list: list[Any], self_added: bool) -> Any:
        wanted = any(default.is_interpolation() for default in defaults_list)
        return map_choices(overrides, defaults_list, self_added) if wanted else None

    ConfigRepository._find_object_source = find_source
    ConfigRepository.load_config = load_config
    CachingConfigRepository.__init__ = new_repository
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_config
    defaults_module._create_interpolation_map = map_choices_if_needed
