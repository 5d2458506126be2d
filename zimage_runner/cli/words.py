"""The words of a command line before Hydra reads them: where options may stand, and what is typed instead of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from omegaconf import DictConfig

from zimage_runner.cli.fields import closest, groups_with, known_fields, reader_of
from zimage_runner.errors import UserError
from zimage_runner.model import names_a_file
from zimage_runner.prompts.text import shown
from zimage_runner.prompts.vocabulary import in_our_words

SWITCHES = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
SWITCHES = (*SWITCHES, "--shell-completion", "-sc")
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
CONFIGS = ("job", "hydra", "all")
"""What --cfg shows."""
INFO = ("--info", "-i")
INFO_KINDS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Hydra's options, but for --experimental-rerun, which runs what a pickle says; the last takes a value or none."""
OWN_EXPERIMENT = "--config-dir FOLDER +experiment=NAME, for the file FOLDER/experiment/NAME.yaml"

OTHER_FIELDS = {
    **dict.fromkeys(("size", "resolution"), "write sampling.width=W sampling.height=H"),
    **dict.fromkeys(("fp16", "bf16", "half", "precision"), "write model.dtype=float16 (or bfloat16, float32)"),
    **dict.fromkeys(("verbose", "debug"), "every run writes run.log, with all there is to say; leave it out"),
    **dict.fromkeys(("overwrite", "force"), "every run has a new folder, nothing is overwritten; leave it out"),
    **dict.fromkeys(
        ("num_images", "num_images_per_prompt", "samples", "n_iter", "batch_count", "count", "n"),
        "for several pictures give several seeds, seeds=1-4",
    ),
    **dict.fromkeys(("sampler", "sampler_name", "scheduler"), "Euler is the model's own sampler; leave it out"),
    **dict.fromkeys(("img", "input"), "write sampling.image=FILE"),
    "experimental_rerun": "resume=RUN goes on with a run",
    **dict.fromkeys(("lowvram", "medvram"), "memory=auto, the default, takes what fits; the least is memory=streamed"),
    "config": f"experiments of your own are in a folder: {OWN_EXPERIMENT}",
}
"""Fields of other programs that have no counterpart of one word, and what to do instead."""


def readable(argv: Sequence[str]) -> list[str]:
    """``argv`` with its options first, as Hydra's parser needs them, and ``experiment=NAME`` with its plus sign.

    Raises UserError for words of other command lines: ``--prompt "a cat"``, ``model=null``.
    """
    if sum(names_config_dir([word]) for word in argv) > 1:
        raise UserError(
            "--config-dir is given twice, and only one folder can be added: put the files of both into one, below "
            "experiment/, prompts/ and so on"
        )
    options: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.strip():
            raise UserError("an empty word is on the command line: is a variable of the shell not set? Quote its value")
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise UserError(
                f"{shown(word)}: not UTF-8: write it in UTF-8; a prompt file with such a name is read by its folder, "
                "prompts=files prompts.glob='*.txt'"
            )
        if not word.startswith("-") or word == "-":
            overrides.append(_override(word, argv))
        else:
            options += _option(word, words, argv)
    return [*options, *overrides]


def names_config_dir(words: Sequence[str]) -> bool:
    """Whether the command line says where config files of the user's own are."""
    return any(word == "-cd" or word.startswith("--config-d") for word in words)


def command_line_wins(config: DictConfig, overrides: Sequence[str]) -> None:
    """Tell the source of prompts which sampling fields are on the command line: ``prompts.wins`` is about those."""
    given = [override.partition("=")[0].lstrip("+") for override in overrides]
    if "typed" in config.prompts:
        fields = [name.removeprefix("sampling.") for name in given if name.startswith("sampling.")]
        config.prompts.typed = [*fields, *(["seeds"] if "seeds" in given else [])]


def _option(word: str, words: Iterator[str], argv: Sequence[str]) -> list[str]:
    name, equals, value = word.partition("=")
    known = [option for option in (*SWITCHES, *WITH_VALUE, *INFO) if name == option]
    if not known and name.startswith("--"):
        known = [option for option in (*SWITCHES, *WITH_VALUE, *INFO) if option.startswith(name)]
    if name == "-p" and not any(other.startswith(("--cfg", "-c=")) or other == "-c" for other in argv):
        known = []  # it would choose a part of --cfg's output
    if name == "--config":
        raise UserError(f"{name}: experiments of your own are in a folder: {OWN_EXPERIMENT}")
    if len(known) > 1 and name not in known:
        raise UserError(f"{name}: this may be {' or '.join(known)}: write the whole word")
    if known in (["--help"], ["--version"]) and name not in known:  # Hydra would answer with its own
        raise UserError(f"{name}: write the whole word, {known[0]}")
    if not known:
        raise UserError(_no_such_option(name, value if equals else next(words, "")))
    if "--resolve" in known and not any(other.startswith(("--cfg", "-c=")) or other == "-c" for other in argv):
        raise UserError("--resolve goes with --cfg job, which prints the run's settings: add that, or leave it out")
    if known[0] in SWITCHES:
        return [word]
    if known[0] in ("--cfg", "-c"):
        value = value if equals else next(words, "")
        if value not in CONFIGS:
            raise UserError(f"{name} {value}: write {name} job for the run's settings (or {', '.join(CONFIGS[1:])})")
        return [name, value]
    if equals:
        return [word]
    if known[0] in INFO:
        return [_with_kind(word, words, argv)]
    following = next(words, None)
    if following is None:
        raise UserError(f"{word}: its value is missing: write it after a space")
    return [word, following]


def _with_kind(word: str, words: Iterator[str], argv: Sequence[str]) -> str:
    """``--info`` with what follows it, if that is a kind of information."""
    following = argv[list(argv).index(word) + 1 :][:1]
    return f"--info={next(words)}" if following and following[0] in INFO_KINDS else word


def _no_such_option(name: str, value: str) -> str:
    word = name.lstrip("-").replace("-", "_")
    if remedy := OTHER_FIELDS.get(word):
        return f"{name}: no such option: {remedy}"
    field = word if word in known_fields("") else next(iter(groups_with(word)), None) or closest(word, "")
    if field is None:
        return f"{name}: no such option; fields are set as field=value, without dashes: see --help"
    plus = "+" if field == "experiment" else ""
    unknown = not value or value.startswith(("-", "+")) or "=" in value
    shown = "true" if field in ("dry_run", "verify") else "..." if unknown else in_our_words(word, value)
    shown = shown if re.fullmatch(r"[\w.,/+-]+", shown) else f"'{shown}'"
    return f"{name}: no such option; fields are set as field=value, without dashes: {plus}{field}={shown}"


def _override(word: str, argv: Sequence[str]) -> str:
    from zimage_runner.config.registry import SCHEMAS
    from zimage_runner.config.schema import at_home

    name, _, value = word.partition("=")
    if name in ("hydra.run.dir", "hydra.sweep.dir"):
        return f"{name}={at_home(value, name)}"
    if name in SCHEMAS and (told := _a_file_for_an_option(name, value, argv)):
        raise UserError(f"{word}: {told}")
    if name in SCHEMAS and value in ("null", "~"):
        without = (
            f": {name}=none does without" if "none" in SCHEMAS[name] else ": choose one of its options, see --help"
        )
        raise UserError(f"{word} is no option{without}")
    return f"+{word}" if word.startswith("experiment=") else word


def _is_option(group: str, value: str, argv: Sequence[str]) -> bool:
    from zimage_runner.cli.help import config_dirs

    return any((root / group / f"{value}.yaml").is_file() for root in config_dirs(argv))


def _a_file_for_an_option(group: str, value: str, argv: Sequence[str]) -> str | None:
    """What to write instead where a file, a folder or a hub's repository is named in place of a group's option."""
    path = PurePath(value)
    if group == "prompts" and (kind := reader_of(path.suffix.lower())):
        return f"write prompts={kind} prompts.path={value}"
    if group == "prompts" and path.name and Path(value).is_dir() and not _is_option(group, value, argv):
        return (
            f"write prompts=files prompts.glob='{path}/*.txt', prompts=folder prompts.path={value} to draw from its "
            f"pictures, or prompts=images prompts.path={value} to draw them anew"
        )
    if group == "model" and names_a_file(value):
        return f"write model=file model.path={value} model.variant=turbo (or base)"
    if group != "model" or "/" not in value:
        return None
    if value.startswith(("/", "~", ".")) or Path(value).is_dir():
        return f"write model=local model.path={value}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        known = {"Tongyi-MAI/Z-Image-Turbo": "model=zimage_turbo", "Tongyi-MAI/Z-Image": "model=zimage_base"}
        return f"write {known.get(value, f'model=zimage_turbo model.repo={value}')}"
    return None
