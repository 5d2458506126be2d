"""Texts of a YAML file stay what was typed, where YAML 1.1 reads a number, a time or a truth value.

``texts: [on, 12:30, 007, 1.10]`` is four texts: the scalars of fields that hold text are read again as they stand in
the file. Numbers of other fields are YAML's affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, ListConfig

from zimage_runner.cli.fields import texts
from zimage_runner.cli.hydra_patches import is_there, node_of, value_of
from zimage_runner.errors import UserError
from zimage_runner.prompts.loras import parse_lora

_Loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Every scalar is a text."""


def keep_texts(config: DictConfig, package: str, path: Path, file: str) -> None:
    """Put into ``config``, which Hydra read from ``path`` for ``package``, the texts that stand in it.

    ``file`` is the file's name for people.

    Raises UserError for a text that cannot be found there again, and for ``???``, which cannot be one.
    """
    raw: Any = None
    for name, kind in texts().items():
        *above, key = name.split(".")
        node = _node(config, above)
        if node is None or node_of(node, key) is None:  # `in` does not see a missing value
            continue
        for parent, entry in _entries(node, key, kind):
            value = value_of(parent, entry)
            where = name if parent is node else f"{name}[{entry}]" if kind == "list" else f"{name}.{entry}"
            if value == MISSING:
                raise UserError(f"{file}: {where}: ??? alone stands for a value that is missing: write other words")
            if value is None or isinstance(value, str | dict | list):
                continue
            raw = yaml.load(path.read_bytes(), Loader=_Loader) if raw is None else raw
            steps = [*name.split("."), *([] if parent is node else [entry])]
            typed = _at(raw, steps[len(package.split(".")) if package else 0 :])
            if not isinstance(typed, str):
                raise UserError(f"{file}: {where}={value}: this is a text: put it in quotation marks")
            parent[entry] = typed


def write_out_loras(config: DictConfig) -> None:
    """Make {path, weight} of entries of ``loras`` that are short: ``style.safetensors:0.8``. Raises UserError."""
    entries = node_of(config, "loras")
    if isinstance(entries, ListConfig) and is_there(entries):
        for place, entry in enumerate(list(entries)):
            if isinstance(entry, str):
                lora = parse_lora(entry, f"loras.{place}")
                entries[place] = {"path": lora.name, "weight": lora.weight}


def _entries(node: DictConfig, key: str, kind: str) -> Iterator[tuple[Any, Any]]:
    """Where the texts of a field stand: the node and key, or index, of each."""
    inside = node_of(node, key)
    if kind == "text" and not isinstance(inside, DictConfig | ListConfig):
        yield node, key
    elif kind == "list" and isinstance(inside, ListConfig) and is_there(inside):
        yield from ((inside, index) for index in range(len(inside)))
    elif kind == "dict" and isinstance(inside, DictConfig) and is_there(inside):
        yield from ((inside, entry) for entry in inside)


def _node(config: DictConfig, path: list[str]) -> DictConfig | None:
    node: Any = config
    for step in path:
        node = node_of(node, step)
        if not isinstance(node, DictConfig) or not is_there(node):
            return None
    return node


def _at(raw: Any, path: list[Any]) -> Any:
    for step in path:
        try:
            raw = raw[step] if isinstance(raw, list) else raw[str(step)]
        except (KeyError, IndexError, TypeError):
            return None
    return raw
