"""The settings of a resumed run: its own, except for what may change without changing a picture."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from zimage_runner.cli.hydra_patches import node_of, value_of
from zimage_runner.cli.interpolation import lookups
from zimage_runner.cli.resume.saved import override_key, root_of, saved_overrides
from zimage_runner.errors import UserError
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.digest import sha256_of
from zimage_runner.outputs.ledger import RECORDS, Ledger
from zimage_runner.outputs.parsed import CONSTRUCTORS_RAISE, check_yaml, from_json
from zimage_runner.outputs.place import record_at
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.prompts.text import is_there
from zimage_runner.sampling import PICTURE_FILES


@functools.cache
def harmless_fields() -> frozenset[str]:
    """Return the fields and groups whose dataclass says that they are HARMLESS."""
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import RunConfig

    nodes = [("", RunConfig), *((f"{group}.", option) for group in SCHEMAS for option in SCHEMAS[group].values())]
    of_all = ((f"{prefix}{field.name}", field.metadata) for prefix, node in nodes for field in fields(node))
    return frozenset(name for name, metadata in of_all if metadata.get("harmless", False))


def restore(config: DictConfig, directory: Path, overrides: list[str], said: Collection[str] = ()) -> DictConfig:
    """The saved config of ``directory`` with the harmless changes among ``overrides`` applied.

    ``config`` was composed from the saved overrides and the user's; it gives the types. ``said``: the fields, and
    ``group=option``, of experiments that are given now. Raises UserError listing every field that would mix different
    pictures in one run.
    """
    saved = _load(directory)
    before = set(saved_overrides(directory))
    of_experiments = {entry.partition("=")[0] for entry in said if entry not in before}
    given = {
        entry: of_experiments if root_of(entry) == "experiment" else {_field_of(entry)}
        for entry in overrides
        if entry not in before
    }
    touched = set().union(*given.values())
    if {"name"} in given.values() and config.name != saved.get("name"):
        raise UserError(
            f"resume={directory}: name={config.name} cannot rename a run, and it was begun as {saved.get('name')}: "
            "leave it out"
        )
    _refuse_other_pictures(directory, saved, config, given)
    restored = config.copy()
    there = {entry for entry in touched if any(_is_below(field, {entry}) for field, _ in leaves(config))}
    for key in saved:
        name = str(key)
        if name not in config:
            raise UserError(
                f"resume={directory}: its field {name} is unknown to this version: use the one it began with"
            )
        inside = {entry for entry in touched if entry == name or entry.startswith(f"{name}.")}
        if name in inside:
            continue  # given anew as a whole
        try:
            _assign(restored, name, saved[key])
            for entry in inside & there:
                OmegaConf.update(restored, entry, OmegaConf.select(config, entry))
        except OmegaConfBaseException as error:
            text = str(error).splitlines()[0]
            raise UserError(f"resume={directory}: its {name} does not fit this version: {text}") from None
    return restored


def _field_of(override: str) -> str:
    return override_key(override).partition("@")[0].replace("/", ".")


def _assign(config: DictConfig, name: str, value: Any) -> None:
    if isinstance(config[name], DictConfig) and isinstance(value, DictConfig):
        config[name] = OmegaConf.merge(config[name], value)
    else:
        config[name] = value


def _load(directory: Path) -> DictConfig:
    try:
        text = Inside(directory, ".hydra/config.yaml").read_bytes()
        check_yaml(text)
        saved = OmegaConf.load(io.StringIO(text.decode()))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, *CONSTRUCTORS_RAISE) as error:
        raise UserError(f"resume={directory}: .hydra/config.yaml cannot be read: {error}") from None
    if not isinstance(saved, DictConfig):
        raise UserError(f"resume={directory}: .hydra/config.yaml is not a config")
    for field, text in lookups(OmegaConf.to_container(saved, resolve=False)):
        raise UserError(
            f"resume={directory}: .hydra/config.yaml: {field}={text} would be looked up, and a saved run is not asked "
            "to: write the value there that it had"
        )
    return saved


def _refuse_other_pictures(
    directory: Path, saved: DictConfig, config: DictConfig, given: Mapping[str, set[str]]
) -> None:
    """``given``: what was typed now, and the fields and groups that each is about."""
    was, now = dict(leaves(saved)), dict(leaves(config))
    for field in (f"sampling.{name}" for name in PICTURE_FILES):
        old, new = was.get(field), now.get(field)
        if isinstance(old, str) and isinstance(new, str) and old != new and _is_same_file(directory, field, old, new):
            was[field] = new  # where it lies changes no picture
    for field in ("prompts.path", "prompts.glob"):
        old, new = was.get(field), now.get(field)
        if isinstance(old, str) and isinstance(new, str) and is_there(new):
            was[field] = new  # what it holds is compared once the settings are: check_same_prompts
    changes = {entry: found for entry, names in given.items() if (found := changed_fields(was, now, names))}
    if changes:
        fields = dict.fromkeys(field for found in changes.values() for field in found)
        raise UserError(
            f"resume={directory}: {' '.join(changes)} would mix other pictures into the run: {'; '.join(fields)}: "
            f"leave {'it' if len(changes) == 1 else 'them'} out, or start a new run"
        )


def _are_same_seeds(one: Any, other: Any) -> bool:
    """Whether two values of ``seeds`` are the same numbers, such as 0-2 and [0,1,2]."""
    try:
        return parse_seeds(one) == parse_seeds(other)
    except UserError:
        return False


def _is_same_file(directory: Path, field: str, old: str, new: str) -> bool:
    """Whether the file ``new`` is what the run's pictures were drawn from; true where that cannot be told."""
    name, file = field.partition(".")[2], os.path.expanduser(new)
    if not os.path.isfile(file):
        return True  # and refused for that when the run is planned
    for item, entry in Ledger.load(directory / RECORDS).entries.items():
        try:
            drawn_from = from_json(record_at(directory, item, entry.place).read_bytes())["inputs"][name]
            if Path(drawn_from["path"]).name == Path(old).name:
                return sha256_of(file) == drawn_from["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return True


def changed_fields(was: dict[str, Any], now: dict[str, Any], touched: set[str] | None = None) -> list[str]:
    """What differs and decides what pictures show: ``field was 1, now 2``. ``touched``: look at these fields alone."""
    missing = object()
    return [
        f"{field} was {_shown(was, field)}, now {_shown(now, field)}"
        for field in dict.fromkeys([*was, *now])
        if was.get(field, missing) != now.get(field, missing)
        and not (field == "seeds" and _are_same_seeds(was.get(field), now.get(field)))
        and not _is_below(field, harmless_fields())
        and (touched is None or _is_below(field, touched))
    ]


def _is_below(field: str, parents: Any) -> bool:
    return any(field == parent or field.startswith(f"{parent}.") for parent in parents)


def leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything that is not a mapping; lists as a whole."""
    for key in config:
        name = f"{prefix}{key}"
        node = node_of(config, key)
        if isinstance(node, DictConfig) and value_of(config, key) not in (None, MISSING):
            yield from leaves(node, f"{name}.")
        else:
            value = None if OmegaConf.is_missing(config, key) else config[key]
            value = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
            # YAML holds an enum by its name.
            yield name, getattr(value, "name", value)


def _shown(values: dict[str, Any], field: str) -> str:
    text = repr(values[field]) if field in values else "not there"
    return text if len(text) <= 80 else f"{text[:77]}..."
