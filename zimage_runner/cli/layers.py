"""A later choice replaces the one before it: the command line over experiments over the base they build on.

Hydra merges what every file says, whatever option of a group it was said for. Here the fields of a group that a file
gave go when a later layer chooses another option of that group, and ``prompt`` and ``prompts`` replace each other in
the same way. What is left out is told in one line; what one file says against itself is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from zimage_runner.cli.fields import field_names, prompt_inputs
from zimage_runner.cli.foreign import foreign_file
from zimage_runner.cli.hydra_patches import DefaultsList, defaults_are_listed_by, files_pass, parse_override
from zimage_runner.cli.typed_texts import keep_texts, write_out_loras
from zimage_runner.errors import UserError
from zimage_runner.logs import say

PLAIN_OPTION = "inline"
"""The option of ``prompts`` that says nothing of what is drawn."""


files_read: dict[str, Path] = {}
"""The user's own config files that the command line is composed of, by their names below the config folder."""
said_by_experiments: set[str] = set()
"""What the experiments of the command line say: names of fields, and ``group=option``."""


@dataclass(kw_only=True)
class Layer:
    """What one file of the run says: a base of the user's own, or an experiment."""

    path: str
    config: dict[str, Any]
    choices: dict[str, str]
    """Group to the option that the file itself chooses."""
    options: dict[str, str] = field(default_factory=dict)
    """Group to the option that stands when the file is read."""

    @property
    def file(self) -> str:
        return f"{self.path}.yaml"

    @property
    def is_experiment(self) -> bool:
        """Also what an experiment builds on; false for the package's own defaults."""
        return "/" in self.path

    def says_prompt(self) -> bool:
        return self.config.get("prompt") is not None

    def says_prompts(self) -> bool:
        return self.choices.get("prompts", PLAIN_OPTION) != PLAIN_OPTION or bool(self.texts())

    def texts(self) -> list[str]:
        """Names of the fields that say what is drawn."""
        prompts = self.config.get("prompts")
        return [name for name in prompt_inputs() if prompts.get(name)] if isinstance(prompts, dict) else []


@contextlib.contextmanager
def later_choices_replace(words: Sequence[str], earlier: Collection[str] = ()) -> Iterator[None]:
    """While this lasts, what Hydra composes follows the rule. ``words``: the command line, which is the last layer.

    ``earlier``: those of its fields and groups that are a resumed run's, over which experiments win.
    """
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words if "=" in word}
    rule = _Rule(given, earlier)
    files_read.clear()
    said_by_experiments.clear()

    def list_defaults(
        as_ever: Callable[[list[Override]], DefaultsList], overrides: list[Override], repo: Any
    ) -> DefaultsList:
        made = as_ever(overrides)
        kept = rule.without_earlier(overrides, made, repo)
        if len(kept) < len(overrides):
            overrides, made = kept, as_ever(kept)
        if rule.needs_plain_prompts(made, repo):
            made = as_ever([*overrides, parse_override(f"prompts={PLAIN_OPTION}")])
        rule.look_at(made, repo)
        return made

    def look(result: ConfigResult, default: ResultDefault) -> ConfigResult:
        path = foreign_file(result, default.config_path or "")
        if path is not None and Path(path).is_file() and isinstance(result.config, DictConfig):
            name = f"{(default.config_path or '').removesuffix('.yaml')}.yaml"
            if ".." not in name.split("/") and not name.startswith("/"):
                files_read[name] = Path(path)
            keep_texts(result.config, default.package or "", Path(path), f"{default.config_path}.yaml")
            write_out_loras(result.config)
        return rule.without_what_is_replaced(result, default)

    with defaults_are_listed_by(list_defaults), files_pass(look):
        yield


class _Rule:
    """Which fields of which file go, for the composition that is under way."""

    def __init__(self, given: dict[str, str], earlier: Collection[str]) -> None:
        self._all = self._given = given
        self._earlier = earlier
        self._left_out: dict[str, list[str]] = {}
        self._told: set[str] = set()

    def without_earlier(self, overrides: list[Override], made: DefaultsList, repo: Any) -> list[Override]:
        """The overrides without those of a resumed run in whose place an experiment says something else."""
        if not self._earlier:
            return overrides
        fields, choices = _said(_layers(made, repo))
        other = {group for group, option in choices.items() if option != self._all.get(group)}
        gone = {
            name
            for name in self._earlier
            if name.partition(".")[0] in other or (name not in made.overrides.known_choices and _overlaps(name, fields))
        }
        self._given = {name: value for name, value in self._all.items() if name not in gone}
        return [override for override in overrides if override.key_or_group not in gone]

    def needs_plain_prompts(self, made: DefaultsList, repo: Any) -> bool:
        """Whether ``prompt`` is said after an option of ``prompts`` was chosen."""
        if "prompts" in self._given or made.overrides.known_choices.get("prompts") in (None, PLAIN_OPTION):
            return False
        said = [layer for layer in _layers(made, repo) if layer.says_prompt() or layer.says_prompts()]
        if self._says_prompt():
            return not self._says_prompts() and bool(said)
        return bool(said) and said[-1].says_prompt() and not said[-1].says_prompts()

    def look_at(self, made: DefaultsList, repo: Any) -> None:
        """Find what is replaced. Raises UserError for a file that says ``prompt`` and ``prompts`` at once."""
        self._left_out = {}
        layers = _layers(made, repo)
        fields, choices = _said(layers)
        said_by_experiments.update(fields, (f"{group}={option}" for group, option in choices.items()))
        final = {key: value for key, value in made.overrides.known_choices.items() if isinstance(value, str)}
        own = {group: option for layer in layers if not layer.is_experiment for group, option in layer.choices.items()}
        for layer in layers:
            self._refuse_hydras_own(layer, own)
            for group, old in layer.options.items():
                new, said = final.get(group), layer.config.get(group)
                if new is None or new == old or not isinstance(said, dict):
                    continue
                known = _fields_of(group, old, repo)
                names = [f"{group}.{name}" for name in said if not known or name in known]
                self._leave_out(layer, names, f"{group}={new} replaces {group}={old}")
        self._replace_prompts(layers)
        self._replace_seeds(layers)

    def _refuse_hydras_own(self, layer: Layer, own: dict[str, str]) -> None:
        """The package's own config has chosen these already: a file that is read after it would say it in vain."""
        for group, option in layer.choices.items():
            if group.startswith("hydra/") and option != own.get(group, option) and group not in self._given:
                raise UserError(
                    f"{layer.file}: override /{group}: {option}: an experiment cannot choose this: remove it, and put "
                    f"{group}={option} on the command line"
                )

    def without_what_is_replaced(self, result: ConfigResult, default: ResultDefault) -> ConfigResult:
        names = self._left_out.get(default.config_path or "", []) if default.package in ("", None) else []
        if not names or not isinstance(result.config, DictConfig):
            return result
        result = copy.copy(result)
        result.config = copy.deepcopy(result.config)
        for name in names:
            group, _, key = name.rpartition(".")
            node = result.config[group] if group else result.config
            if isinstance(node, DictConfig) and key in node:
                with open_dict(node):
                    del node[key]
        return result

    def _replace_prompts(self, layers: list[Layer]) -> None:
        """The last layer that says what is drawn says all of it."""
        by_prompt, by_prompts = self._says_prompt(), self._says_prompts()
        winner = "prompt" if by_prompt else "prompts"
        for layer in reversed(layers):
            gone = self._left_out.get(layer.path, [])
            texts = [f"prompts.{name}" for name in layer.texts() if f"prompts.{name}" not in gone]
            if by_prompts and not by_prompt and layer.says_prompt():
                self._leave_out(layer, ["prompt"], f"{winner} replaces prompt")
            elif by_prompt and not by_prompts and texts:
                self._leave_out(layer, texts, f"prompt replaces {', '.join(texts)}")
            elif not (by_prompt or by_prompts):
                by_prompt, by_prompts = layer.says_prompt(), layer.says_prompts()
                winner = "prompt" if by_prompt else "prompts"
                if by_prompt and by_prompts:
                    which = texts[0] if texts else f"prompts={layer.choices['prompts']}"
                    raise UserError(
                        f"{layer.file}: prompt and {which} are both set: use prompt for one prompt, or prompts for many"
                    )

    def _replace_seeds(self, layers: list[Layer]) -> None:
        """Hydra can put no list in a mapping's place, and no mapping in a list's."""
        later, replaced = None, "seeds" in self._given
        for layer in reversed(layers):
            seeds = layer.config.get("seeds")
            if seeds is not None:
                replaced = replaced or (later is not None and isinstance(seeds, dict) != isinstance(later, dict))
                later = seeds
                if replaced:
                    self._left_out.setdefault(layer.path, []).append("seeds")

    def _leave_out(self, layer: Layer, names: list[str], why: str) -> None:
        if names:
            self._left_out.setdefault(layer.path, []).extend(names)
            line = f"{why}: left out {', '.join(names)} of {layer.file}"
            if line not in self._told:
                self._told.add(line)
                say(line)

    def _says_prompt(self) -> bool:
        return self._given.get("prompt", "null") != "null"

    def _says_prompts(self) -> bool:
        fields = any(f"prompts.{name}" in self._given for name in prompt_inputs())
        return fields or self._given.get("prompts", PLAIN_OPTION) != PLAIN_OPTION


def _layers(made: DefaultsList, repo: Any) -> list[Layer]:
    """The files that speak of the whole run, in the order in which they are merged."""
    layers: list[Layer] = []
    standing: dict[str, str] = {}
    for default in made.defaults:
        path = default.config_path
        if path is None or default.package not in ("", None) or path.startswith(("schema/", "hydra/")):
            continue
        loaded = repo.load_config(config_path=path)
        if loaded is None or not isinstance(loaded.config, DictConfig):
            continue
        config = OmegaConf.to_container(loaded.config, resolve=False)
        assert isinstance(config, dict)
        choices = {
            str(entry.group).lstrip("/"): entry.value
            for entry in loaded.defaults_list or ()
            if isinstance(entry, GroupDefault) and isinstance(entry.value, str) and entry.package is None
        }
        standing = standing | choices
        named = {str(key): value for key, value in config.items()}
        layers.append(Layer(path=path, config=named, choices=choices, options=dict(standing)))
    return layers


def _said(layers: Sequence[Layer]) -> tuple[set[str], dict[str, str]]:
    """Names of the fields that experiments set, and the option of each group that they choose."""
    fields: set[str] = set()
    choices: dict[str, str] = {}
    for layer in filter(lambda one: one.is_experiment, layers):
        fields.update(_leaf_names(layer.config))
        choices |= layer.choices
        if layer.says_prompt() or layer.says_prompts():  # which says all of what is drawn
            fields |= {"prompt", *(f"prompts.{name}" for name in prompt_inputs())}
            standing = layer.choices if layer.says_prompt() else layer.options
            choices["prompts"] = standing.get("prompts", PLAIN_OPTION)
    return fields, choices


def _leaf_names(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaf_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _overlaps(name: str, names: Collection[str]) -> bool:
    """Whether one of ``names`` is this field, lies in it or holds it."""
    return any(f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.") for one in names)


def _fields_of(group: str, option: str, repo: Any) -> set[str]:
    """The fields that an option has, by the schema that its file names; nothing where it names none."""
    from zimage_runner.config.registry import SCHEMAS

    waiting, seen = [f"{group}/{option}"], set()
    while waiting:
        path = waiting.pop()
        schema = (
            SCHEMAS.get(group, {}).get(path.removeprefix(f"schema/{group}/")) if path.startswith("schema/") else None
        )
        if schema is not None:
            return set(field_names(schema))
        loaded = None if path in seen else repo.load_config(config_path=path)
        seen.add(path)
        for entry in (loaded.defaults_list or ()) if loaded is not None else ():
            if isinstance(entry, ConfigDefault) and entry.path and entry.path != "_self_":
                waiting.append(entry.path[1:] if entry.path.startswith("/") else f"{group}/{entry.path}")
    return set()
