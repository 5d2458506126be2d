"""The text of --help: every option of every group with the first line of its file, and every field of one group.

Hydra's own listing copies every schema once a group, which takes seconds. The list of options imports neither Hydra nor
torch; a group's fields are read from the dataclasses, which import Hydra.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from zimage_runner.cli.commands import COMMANDS
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import UserError, called

HEAD = """\
zimage_runner: batches of pictures with Z-Image-Turbo - prompts x seeds, loaded and warmed once.

  python -m zimage_runner +experiment=NAME [group=option] [field=value]     (-m: sweep comma-separated values)
  python -m zimage_runner prompt="a cat" output_file=cat.png

Commands, as the first word (--help COMMAND tells more of one):
{commands}

Config groups, as group=option (experiments as +experiment=NAME):
"""
TAIL = """
Every field can be set on the command line, such as sampling.height=512 or seeds="0-9".
  The fields of a group:   --help prompts          (or --help prompts=csv)
  Fields of the run:       --help run              (prompt, seeds, output_file, resume, dry_run ...)
  The composed config:     --cfg job
  The plan, no drawing:    dry_run=true
  Your own experiments:    --config-dir my_conf +experiment=mine
  Experiments of others:   are data; those that name code need --trust-code as well
  Finish a run:            resume=latest           (or resume=RUN_DIRECTORY)
  Begin it or finish it:   continue=RUN_DIRECTORY
  Completion by Tab:       --shell-completion install=bash     (or zsh, fish), for the shell's start file
  Hydra's own options:     --hydra-help

Exit codes: 0 all items done, 1 some items failed, 2 bad config or input, 130 interrupted, resumable.
"""

WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
"""Options whose value may stand as a word of its own."""
RUN = "run"
"""Stands for the fields outside of all groups."""
EXPERIMENT = "experiment"
CONTINUE = "Begin the run in this directory, or finish the one that is there: one command line for both."
"""Of ``continue``, which is a word of the command line alone (resume/command_line.py)."""
WIDTH = 110


def help_text(argv: Sequence[str]) -> str:
    """What --help prints; options of a --config-dir on the same command line included.

    With the name of a group beside it: that group's fields, for which the schemas (and with them Hydra) are imported.
    Raises UserError for the name of something else.
    """
    argv = [head if dot and is_group(head) else word for word in argv for head, dot, _ in (word.partition("."),)]
    words = [word for word in argv if word.partition("=")[0].isidentifier()]
    if groups := [word for word in words if is_group(word)]:
        return fields_text(groups) + "\n"
    bare = [word for before, word in itertools.pairwise(["", *argv]) if word in words and before not in WITH_VALUE]
    if EXPERIMENT in bare:
        return "\n".join(["Experiments, as +experiment=NAME:", *_listed(EXPERIMENT, argv)]) + "\n"
    if unknown := [word for word in bare if "=" not in word]:
        raise UserError(
            f"--help {unknown[0]}: no such group; the groups are {', '.join([RUN, *_schemas(), EXPERIMENT])}"
        )
    lines = []
    for group in sorted({path.parent.name for root in config_dirs(argv) for path in root.glob("*/*.yaml")}):
        lines.append(f"\n  {group}")
        lines += _listed(group, argv)
    commands = "\n".join(f"  {name:<22} {description}" for name, description in COMMANDS.items())
    return called(HEAD.format(commands=commands)) + "\n".join(lines).lstrip("\n") + "\n" + TAIL


def config_dirs(argv: Sequence[str]) -> list[Path]:
    """``conf/`` and what --config-dir adds to it."""
    roots = [CONFIG_DIR]
    for position, word in enumerate(argv):
        if word.startswith("--config-dir="):
            roots.append(Path(word.partition("=")[2]))
        elif word in ("--config-dir", "-cd") and position + 1 < len(argv):
            roots.append(Path(argv[position + 1]))
    return roots


def _listed(group: str, argv: Sequence[str]) -> list[str]:
    return [f"    {name:<20} {description}".rstrip() for name, description in _options(group, argv)]


def _options(group: str, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for path in sorted(path for root in config_dirs(argv) for path in (root / group).glob("*.yaml")):
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        described = [line[2:] for line in comments if not line.startswith("# @package")]
        yield path.stem, described[0] if described else ""


def _schemas() -> dict[str, dict[str, type]]:
    from zimage_runner.config.registry import SCHEMAS

    return SCHEMAS


def _run_config() -> type:
    from zimage_runner.config.schema import RunConfig

    return RunConfig


def fields_text(words: Sequence[str]) -> str:
    """What is printed for words such as ``prompts``, ``prompts=csv`` and ``run``."""
    return "\n".join(line for word in words for line in _of_word(word))


def is_group(word: str) -> bool:
    """True for what ``--help`` can say more of: a group, a group's option, ``run``."""
    group, _, option = word.partition("=")
    return group == RUN or (group in _schemas() and (not option or _schema(group, option) is not None))


def _schema(group: str, option: str) -> type | None:
    """The dataclass of an option; several options of ``model`` and ``sampling`` share one."""
    options = _schemas()[group]
    return options.get(option) or (next(iter(options.values())) if len(options) == 1 else None)


def _of_word(word: str) -> Iterator[str]:
    group, _, option = word.partition("=")
    if group == RUN:
        yield "Fields of a run, as field=value:"
        yield from _described(_run_config(), "", skip=set(_schemas()))
        yield from ("  continue=null", *_wrapped(CONTINUE, "      ", "      "))
        return
    chosen = [_schema(group, option)] if option else list(_schemas()[group].values())
    schemas = [schema for schema in chosen if schema is not None]
    common = set.intersection(*(set(_names(schema)) for schema in schemas))
    yield f"Fields of {word}, as field=value:"
    yield from _described(schemas[0], f"{group}.", only=common)
    told: set[tuple[str, str]] = set()
    for name, schema in _schemas()[group].items() if len(schemas) > 1 else ():
        if own := [field for field in _names(schema) if field not in common]:
            yield f"\nof {group}={name}:"
            yield from _described(schema, f"{group}.", only=set(own), told=told)


def _names(schema: type) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def _described(
    schema: Any,
    prefix: str,
    only: set[str] | None = None,
    skip: Collection[str] = (),
    told: set[tuple[str, str]] | None = None,
) -> Iterator[str]:
    """Lines for the fields in ``only`` and not in ``skip``; texts in ``told`` are not told again."""
    documentation = _documentation(schema)
    for field in dataclasses.fields(schema):
        if field.name in skip or (only is not None and field.name not in only):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = documentation.get(field.name, "")
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            if text:
                yield from _wrapped(f"{prefix}{field.name}: {text}", "  ", "      ")
            yield from _described(type(default), f"{prefix}{field.name}.")
            continue
        yield f"  {prefix}{field.name}={_shown(default)}{_choices(default)}"
        if told is None or (field.name, text) not in told:
            yield from _wrapped(text, "      ", "      ")
        if told is not None:
            told.add((field.name, text))


def _wrapped(text: str, first: str, following: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=following)


def _shown(default: Any) -> str:
    if default is None or default is dataclasses.MISSING:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return default.name if isinstance(default, enum.Enum) else str(default)


def _choices(default: Any) -> str:
    if not isinstance(default, enum.Enum):
        return ""
    return f"    ({', '.join(member.name for member in type(default))})"


@functools.cache
def _documentation(schema: type) -> dict[str, str]:
    """The text below each field, of the class and those it inherits from; the nearest wins."""
    found: dict[str, str] = {}
    for parent in reversed(schema.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= _own_documentation(parent)
    return found


def _own_documentation(schema: type) -> dict[str, str]:
    # Not inspect.getsource(class): a dataclass with slots is another class than the one in the file.
    tree = ast.parse(inspect.getsource(sys.modules[schema.__module__]))
    body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == schema.__name__), [])
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
