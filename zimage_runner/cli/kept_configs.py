"""Hydra composes as ever, but what it has read and merged of this package's own ``conf/`` is kept for the process.

For a process that composes again and again: the resident one, and the test suite. Everything else takes its usual way:
the command line, experiments, folders of others, checks, errors.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from hydra._internal import defaults_list as defaults_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.object_type import ObjectType

from zimage_runner.config.paths import CONFIG_DIR

OWN = (f"file://{CONFIG_DIR}", "pkg://hydra.conf", "structured://")
"""Sources whose content is the same for the whole process."""


def is_own(source: Any) -> bool:
    return f"{source.scheme()}://{source.path}" in OWN


@functools.cache
def keep_what_was_composed() -> None:
    """Call once, for the process."""
    load, compose = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
    map_choices = defaults_module._create_interpolation_map
    results: dict[tuple[str, str], Any] = {}
    configs: dict[tuple[Any, ...], Any] = {}

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None or not is_own(source):
            return load(self, config_path)
        key = (source.scheme(), config_path)
        if key not in results:
            results[key] = load(self, config_path)
        return results[key]

    def compose_config(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
        key = tuple((d.config_path, d.parent, d.package, d.is_self, d.primary, d.override_key) for d in defaults)
        if not all(map(is_own, repo.get_sources())) or any("experiment" in str(d.config_path) for d in defaults):
            repo.cache = copy.deepcopy(repo.cache)  # merging writes into what was loaded
            return compose(self, defaults, repo)
        if key not in configs:
            repo.cache = copy.deepcopy(repo.cache)
            configs[key] = compose(self, defaults, repo)
        return copy.deepcopy(configs[key])

    def new_repository(self: CachingConfigRepository, delegate: Any) -> None:
        self.delegate = copy.copy(delegate)  # Hydra copies every schema with it, and replaces its list of sources alone
        self.cache = {}

    def map_choices_if_needed(overrides: Any, defaults_list: list[Any], self_added: bool) -> Any:
        wanted = any(default.is_interpolation() for default in defaults_list)
        return map_choices(overrides, defaults_list, self_added) if wanted else None

    ConfigRepository.load_config = load_config
    CachingConfigRepository.__init__ = new_repository
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_config
    defaults_module._create_interpolation_map = map_choices_if_needed
