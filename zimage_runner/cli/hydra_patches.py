"""What is quicker than in Hydra and OmegaConf, with the same outcome: the one file that touches their private parts.

Composing a sweep's jobs: Hydra composes each from its files anew, twice (once to check it), 2 x 70 ms a job. Jobs that
differ in values alone start here from one composed config; only another choice of config groups is composed again.
Composing a single run once instead of twice, copying configs, and writing them as YAML.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import is_float, is_int, yaml_is_bool

KEPT = 10_000
"""Configs made for the check and not asked for again; about 100 KB each."""
_BaseDumper: Any = getattr(yaml, "CDumper", yaml.Dumper)
"""libyaml's, where PyYAML was built with it."""


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


@contextlib.contextmanager
def copied_quickly() -> Iterator[None]:
    """While this lasts, whole configs are copied in a third of the time: Hydra copies each run's six times."""
    DictConfig.__deepcopy__ = _copy
    try:
        yield
    finally:
        DictConfig.__deepcopy__ = _deepcopy


class SweepComposer:
    """Stands in for ``ConfigLoader.load_sweep_config`` and gives the same configs."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
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
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        tasks = [override for override in parsed if not override.is_hydra_override()]
        config.hydra.overrides.task = [override.input_line for override in tasks]
        names = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            overrides=tasks, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
        )
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _is_value(self, override: Override) -> bool:
        """True for ``field=value``: applied last, to a config that is composed already."""
        changes_field = not (override.is_delete() or override.is_add() or override.is_force_add() or override.package)
        return changes_field and not override.is_hydra_override() and not self._is_group(override.key_or_group)

    def _is_group(self, key: str) -> bool:
        return self._loader.repository.group_exists(config_path=key)


@functools.lru_cache(maxsize=4096)
def parse_override(text: str) -> Override:
    """One word of a command line as Hydra reads it. Raises HydraException."""
    return OverridesParser.create().parse_override(text)


def compose_quickly(loader: ConfigLoader) -> SweepComposer:
    """Make this loader compose sweep jobs with the SweepComposer that is returned."""
    assert isinstance(loader, ConfigLoaderImpl)
    composer = SweepComposer(loader)
    loader.load_sweep_config = composer  # pyright: ignore[reportAttributeAccessIssue]
    return composer


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper makes of a multirun's, in its order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


@contextlib.contextmanager
def composed_once(argv: Sequence[str]) -> Iterator[None]:
    """Spare Hydra the composition that only finds out hydra.mode: nothing under ``conf/`` sets it.

    Command lines that may set it, or bring config files of their own, are composed twice as ever.
    """
    if any(map(_may_set_mode, argv)):
        yield
        return
    get_mode = Hydra.get_mode
    Hydra.get_mode = _mode_not_configured
    try:
        yield
    finally:
        Hydra.get_mode = get_mode


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
