"""What Hydra and OmegaConf say of an experiment file that is YAML but no experiment, in words for its writer."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from zimage_runner.cli.fields import field_of_type, known_fields
from zimage_runner.cli.help import config_dirs
from zimage_runner.config.paths import CONFIG_DIR

PACKAGE_LINE = "the file's first line has to be '# @package _global_'"
_BOM = b"\xef\xbb\xbf"


def file_of(text: str) -> str:
    """``experiment/mine.yaml: `` where Hydra says that it happened in a file, else nothing."""
    source = re.search(r"In '([^']+)': ", text)
    return f"{source[1]}.yaml: " if source else ""


def explain_file(text: str) -> str | None:
    """One line for a mistake that only files make, or None."""
    told = (
        _not_a_group(text)
        or _no_value(text)
        or _not_a_mapping(text)
        or _defaults_list(text)
        or _dangling_reference(text)
        or _no_such_file(text)
    )
    return None if told is None else f"{file_of(text)}{told}"


def explain_bytes(error: UnicodeDecodeError) -> str:
    """A config file that is not UTF-8; which one is found by looking."""
    for path in _files():
        raw = path.read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as found:
            line = raw[: found.start].count(b"\n") + 1
            return f"{path}:{line}: byte 0x{raw[found.start]:02x} is not UTF-8: save the file as UTF-8"
    return f"a config file is not UTF-8 ({error}): save it as UTF-8"


def missing_package(text: str) -> str:
    """An experiment without its package line, or with something before it that no editor shows."""
    name = file_of(text).removesuffix(": ")
    starts_with_mark = [p for p in _files() if str(p).endswith(f"/{name}") and p.read_bytes().startswith(_BOM)]
    if starts_with_mark:
        return f"{starts_with_mark[0]}:1: starts with a byte order mark: save the file as UTF-8 without one"
    return f"{name}: {PACKAGE_LINE}"


def _files() -> Iterator[Path]:
    for root in config_dirs(sys.argv[1:]):
        yield from sorted(path for path in root.rglob("*.yaml") if path.is_file())


def _not_a_group(text: str) -> str | None:
    """``model: zimage_turbo``, as every other YAML file would write it."""
    match = re.search(r"Merge error: \w+ is not a subclass of (?P<type>\w+)\. value: (?P<value>[^\n]*)", text)
    field = match and field_of_type(match["type"])
    if not match or not field:
        return None
    value = match["value"]
    if (CONFIG_DIR / field).is_dir() and (CONFIG_DIR / field / f"{value}.yaml").is_file():
        return f"{field}: {value}: an option is chosen in the file's list of defaults: '- override /{field}: {value}'"
    fields = ", ".join(known_fields(field)) or "see --cfg job"
    return f"{field}: {value}: this is no single value: write its fields below it, indented ({fields})"


def _no_value(text: str) -> str | None:
    field = re.search(r"full_key: (\S+)", text)
    if field and re.search(r"field '[^']+' is not Optional", text):
        if not file_of(text):
            return f"{field[1]}=null: this field takes no null: write a value, or leave it out"
        return f"{field[1]}: there is no value after the colon: write one, or remove the line"
    if field and "NoneType is not a subclass of str. value: None" in text:
        return f"{field[1]} is empty: write a text, in quotation marks if it is the word null"
    return None


def _not_a_mapping(text: str) -> str | None:
    if "Cannot merge DictConfig with ListConfig" not in text:
        return None
    field = re.search(r"full_key: (\S+)", text)
    where = f"{field[1]}: " if field else ""
    return f"{where}a list stands where field: value is needed: remove the dashes"


def _defaults_list(text: str) -> str | None:
    if match := re.search(r"Could not override '(?P<group>\w+)@experiment\.\w+'", text):
        return PACKAGE_LINE
    if match := re.search(r"Could not override 'experiment/(?P<group>\w+)(@\w+)?'", text):
        return f"override {match['group']}: write it with a slash, '- override /{match['group']}: ...'"
    if match := re.search(r"Multiple values for (?P<group>[\w/]+)\..* use 'override (?P<choice>[^']+)'", text):
        if match["group"] == "experiment":
            return "experiment is chosen twice: write +experiment=[one,other]; what the later says wins"
        return f"{match['group']} is chosen already: write '- override /{match['choice']}' in the list of defaults"
    if match := re.search(r"Could not override '(?P<group>[\w/]+)'\.\s+No match in the defaults list", text):
        groups = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
        close = difflib.get_close_matches(match["group"], groups, 1)
        hint = f"did you mean {close[0]}?" if close else f"the groups are {', '.join(groups)}"
        return f"{match['group']}: no such config group; {hint}"
    return None


def _dangling_reference(text: str) -> str | None:
    if unset := re.search(r"Environment variable '(?P<name>[^']*)' not found", text):
        return _unset_variable(unset["name"], text)
    match = re.search(r"Interpolation key '(?P<key>[^']*)' not found", text)
    if match is None:
        match = re.search(r"Unsupported interpolation type (?P<key>\w+)", text)
    field = re.search(r"full_key: (\S+)", text)
    if match is None:
        return None
    where = f"{field[1]}: " if field else ""
    return f"{where}${{{match['key']}}} refers to no field: write \\${{ for these two characters as they are"


def _unset_variable(name: str, text: str) -> str:
    """``${oc.env:USER}`` where the environment has none such; the file is found by looking."""
    field = re.search(r"full_key: (\S+)", text)
    asked = f"${{oc.env:{name}"
    where = next(
        (
            f"{path}:{number}: "
            for path in _files()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if asked in line
        ),
        "",
    )
    typed = next((word for word in sys.argv[1:] if asked in word), None)
    said = typed or (f"{where}{field[1]}={asked}}}" if field else f"{where}{asked}}}")
    return (
        f"{said}: the environment variable {name} is not set: set it, or write {asked},DEFAULT}} for a "
        "value to use instead"
    )


def _no_such_file(text: str) -> str | None:
    if match := re.search(r"Cannot find primary config '(?P<name>[^']*)'", text):
        return f"--config-name {match['name']}: leave it out; an experiment is chosen with +experiment={match['name']}"
    if match := re.search(r"Additional config directory '(?P<path>[^']*)' not found", text):
        return f"--config-dir: there is no folder {match['path']}: name the one that holds experiment/"
    return None


def experiment_file(word: str) -> str | None:
    """A file's path where the name of an experiment is needed: how to name it."""
    path = Path(word.rpartition("=")[2])
    if path.suffix not in (".yaml", ".yml"):
        return None
    folder = path.parent.parent if path.parent.name == "experiment" else "FOLDER"
    above = "" if path.parent.name == "experiment" else ", the file being FOLDER/experiment/" + path.name
    return f"{word}: an experiment is named, not its file: --config-dir {folder} +experiment={path.stem}{above}"


def misplaced(option: str) -> str:
    """Where a config file of this name lies, if it is one folder above or below where Hydra looks."""
    group, _, name = option.rpartition("/")
    for root in config_dirs(sys.argv[1:]):
        if root.name == group and (root / f"{name}.yaml").is_file():
            return f" ({root / name}.yaml exists: --config-dir takes the folder above it, {root.parent})"
        if (root / f"{name}.yaml").is_file():
            return f" ({root / name}.yaml exists: put it into {root / group})"
    return ""
