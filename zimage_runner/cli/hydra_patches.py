"""Private parts of Hydra and OmegaConf: what others read there, change or hook into goes through this one file.

What is quicker than in Hydra, with the same outcome (composing a single run once instead of twice, copying configs,
writing them as YAML, keeping what was composed), and what is done with each file that Hydra reads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml
from hydra._internal import config_loader_impl
from hydra._internal import defaults_list as defaults_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import is_float, is_int, yaml_is_bool
from omegaconf.errors import OmegaConfBaseException

from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import UserError

_BaseDumper: Any = getattr(yaml, "CDumper", yaml.Dumper)
"""libyaml's, where PyYAML was built with it."""


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """While this lasts, an attribute of a class or module is another."""
    was = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, was)


def node_of(config: Any, key: Any) -> Any:
    """The node below ``key`` as it stands, interpolations too; None for a key that is not there."""
    return config._get_node(key)


def value_of(config: Any, key: Any) -> Any:
    """The value below ``key``; an interpolation, or ``???``, as its text."""
    return config._get_node(key)._value()


def is_there(node: DictConfig | ListConfig) -> bool:
    """Whether a container holds entries, if only none: it is not null, not ``???`` and no interpolation."""
    return not (node._is_none() or node._is_missing() or node._is_interpolation())


def files_pass(look: Callable[[ConfigResult, ResultDefault], ConfigResult]) -> contextlib.AbstractContextManager[None]:
    """While this lasts, Hydra composes what ``look`` returns for each config file, which may raise as well.

    The file is loaded, with the package that a defaults list puts it into.
    """
    load = ConfigLoaderImpl._load_single_config

    def load_single_config(self: ConfigLoaderImpl, default: ResultDefault, repo: Any) -> ConfigResult:
        return look(load(self, default, repo), default)

    return replaced(ConfigLoaderImpl, "_load_single_config", load_single_config)


def primary_file_passes(look: Callable[[ConfigResult, str], None]) -> contextlib.AbstractContextManager[None]:
    """While this lasts, ``look`` may raise before packages that the primary config's searchpath names are imported."""
    search = ConfigLoaderImpl._process_config_searchpath

    def process_searchpath(self: ConfigLoaderImpl, config_name: str | None, parsed_overrides: Any, repo: Any) -> None:
        primary = None if config_name is None else repo.load_config(config_path=config_name)
        if primary is not None:
            look(primary, str(config_name))
        search(self, config_name, parsed_overrides, repo)

    return replaced(ConfigLoaderImpl, "_process_config_searchpath", process_searchpath)


def files_are_read_by(
    read: Callable[[str, str, Callable[[], ConfigResult]], ConfigResult],
) -> contextlib.AbstractContextManager[None]:
    """While this lasts, config files come from ``read(folder, name, as_ever)``."""
    Plugins.instance()  # which imports the sources again: only the registry knows the class in use
    source = SourcesRegistry.instance().resolve("file")
    load = source.load_config

    def load_config(self: Any, config_path: str) -> ConfigResult:
        return read(self.path, config_path, lambda: load(self, config_path))

    return replaced(source, "load_config", load_config)


def defaults_are_listed_by(
    make: Callable[[Callable[[list[Override]], DefaultsList], list[Override], Any], DefaultsList],
) -> contextlib.AbstractContextManager[None]:
    """While this lasts, the files to compose come from ``make(as_ever, overrides, repository)``."""
    create = defaults_module.create_defaults_list

    def create_defaults_list(
        repo: Any, config_name: str | None, overrides_list: list[Override], **options: Any
    ) -> DefaultsList:
        return make(lambda overrides: create(repo, config_name, overrides, **options), overrides_list, repo)

    return replaced(config_loader_impl, "create_defaults_list", create_defaults_list)


class Kept:
    """A config of which copies are wanted, again and again."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._bytes = _pickled(config)

    def new(self) -> DictConfig:
        """A copy that shares nothing."""
        return copy.deepcopy(self._config) if self._bytes is None else pickle.loads(self._bytes)


def _pickled(config: DictConfig) -> bytes | None:
    """The config, without its parent, as pickle writes it; None for one that has a value it cannot write."""
    fields = vars(config)
    parent, fields["_parent"] = fields["_parent"], None
    try:
        return pickle.dumps(config, pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever a class of others raises: such a config is copied as ever
        return None
    finally:
        fields["_parent"] = parent


_deepcopy = DictConfig.__deepcopy__


def _copy(self: DictConfig, memo: dict[int, Any]) -> DictConfig:
    """What ``DictConfig.__deepcopy__`` returns, three times faster. Parts of a larger copy are left to OmegaConf."""
    written = None if memo else _pickled(self)
    if written is None:
        return _deepcopy(self, memo)
    copied = pickle.loads(written)
    vars(copied)["_parent"] = vars(self)["_parent"]  # kept, and not copied
    return copied


def copied_quickly() -> contextlib.AbstractContextManager[None]:
    """While this lasts, whole configs are copied in a third of the time: Hydra copies each run's six times."""
    return replaced(DictConfig, "__deepcopy__", _copy)


@functools.lru_cache(maxsize=4096)
def parse_override(text: str) -> Override:
    """One word of a command line as Hydra reads it. Raises HydraException."""
    return OverridesParser.create().parse_override(text)


def names_in_lists_are_refused() -> contextlib.AbstractContextManager[None]:
    """For ``seeds.count=4`` where seeds are a list: Hydra would end in a traceback."""
    apply = ConfigLoaderImpl._apply_overrides_to_config

    def apply_each(overrides: list[Override], config: DictConfig) -> None:
        for override in overrides:
            try:
                apply([override], config)
            except (ValueError, ConfigCompositionException):
                key = override.key_or_group
                field, _, name = key.rpartition(".")
                entries = _selected(config, field)
                if isinstance(entries, ListConfig) and not is_int(name):
                    whole = f"give it as a whole, {field}=..."
                    raise UserError(f"{key}: {field} is a list here, and has no names: {whole}") from None
                raise

    return replaced(ConfigLoaderImpl, "_apply_overrides_to_config", staticmethod(apply_each))


def _selected(config: DictConfig, key: str) -> Any:
    """What is at ``key``; None where nothing can be."""
    try:
        return OmegaConf.select(config, key) if key else None
    except OmegaConfBaseException:
        return None


def apply_overrides(overrides: list[Override], config: DictConfig) -> None:
    """Write values of the command line into a composed config. Raises ConfigCompositionException."""
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)


def directory_name(overrides: list[Override], config: DictConfig) -> str:
    """What Hydra calls a job's folder by its overrides, in the way that the job's config says."""
    names = config.hydra.job.config.override_dirname
    return get_overrides_dirname(
        overrides=overrides, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
    )


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper makes of a multirun's, in its order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def composed_once(argv: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Spare Hydra the composition that only finds out hydra.mode: nothing under ``conf/`` sets it.

    Command lines that may set it, or bring config files of their own, are composed twice as ever.
    """
    if any(map(_may_set_mode, argv)):
        return contextlib.nullcontext()
    return replaced(Hydra, "get_mode", _mode_not_configured)


def _may_set_mode(word: str) -> bool:
    field = word.partition("=")[0].lstrip("+~")
    says_so = field in ("hydra", "hydra.mode") or field.startswith(("hydra/", "hydra@"))
    return says_so or (word.startswith("-") and word not in ("-m", "--multirun"))


def _mode_not_configured(*_: Any, **__: Any) -> None:
    """What ``Hydra.get_mode`` returns when no config sets one: the command line decides."""


class _Dumper(_BaseDumper):
    """Quotes what OmegaConf would read as a number or a truth value, as OmegaConf's own dumper does."""


def _represent_str(dumper: Any, text: str) -> Any:
    style = "'" if yaml_is_bool(text) or is_int(text) or is_float(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def to_yaml(config: Any) -> str:
    """Return the config as YAML text, several times faster than ``OmegaConf.to_yaml``: a sweep writes two for each job.

    ``OmegaConf.load`` of the text gives the config back; interpolations are kept as they are.
    """
    container = (
        OmegaConf.to_container(config, resolve=False, enum_to_str=True) if OmegaConf.is_config(config) else config
    )
    return yaml.dump(container, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_Dumper)


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
    """From here on, keep what Hydra has read and merged of this package's own ``conf/`` for the process.

    For a process that composes again and again: the resident one, and the test suite. Everything else takes its usual
    way: the command line, experiments, folders of others, checks, errors.
    """
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
