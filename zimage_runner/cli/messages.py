"""Hydra's and OmegaConf's errors in one line that names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from pathlib import PurePath
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from zimage_runner.cli.commands import COMMANDS
from zimage_runner.cli.fields import (
    closest,
    field_names,
    groups_with,
    kind_of,
    known_fields,
    option_of,
    options_with,
    reader_of,
)
from zimage_runner.cli.file_mistakes import (
    experiment_file,
    explain_bytes,
    explain_file,
    file_of,
    misplaced,
    missing_package,
)
from zimage_runner.cli.words import OTHER_FIELDS
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import PROGRAM, UserError, called, exception_chain
from zimage_runner.prompts.vocabulary import cfg_hint

CONFIG_ERRORS = (HydraException, ConfigCompositionException, OmegaConfBaseException, YAMLError)

YAML_HINTS = {
    "'\\t'": "indent with blanks instead of tabs",
    "mapping values": "put text that holds a colon in quotation marks, and indent neighbours alike",
}
PLAIN_WORDS = {
    "converted to Integer": "not a whole number: write one without quotation marks or a point",
    "converted to Float": "not a number: write one such as 2.5",
    "is not a valid bool": "neither true nor false: write one of them",
}
"""What OmegaConf says of a value, and what people understand."""
MEANT = {
    "help": "--help",
    "version": "--version",
    "list": "status",
    "models": "--help model",
    **dict.fromkeys(("draw", "generate", "sample", "txt2img"), "run prompt='...'"),
}
"""Words of other command lines, and what does it here."""


def explain(error: BaseException) -> str:
    """One line for a composition error; the cause's text is used where Hydra wraps it."""
    if isinstance(error, UnicodeDecodeError):
        return explain_bytes(error)
    chain = exception_chain(error, suppressed=False)
    ours = next((e for e in chain if isinstance(e, UserError)), None)
    if ours is not None:
        return str(ours)
    marked = next((e for e in chain if isinstance(e, MarkedYAMLError)), None)
    if marked is not None and (mark := marked.problem_mark or marked.context_mark) is not None:
        problem = str(marked.problem or marked.context)
        hint = next((f"; {hint}" for sign, hint in YAML_HINTS.items() if sign in problem), "")
        return f"{mark.name}:{mark.line + 1}: not readable as YAML data: {problem}{hint}"
    texts = [str(e) for e in chain]
    text = "\n".join(texts)
    return (
        _experiment_file(chain)
        or _no_assignment(text)
        or _bad_value(chain)
        or _sweep_without_multirun(text)
        or _no_option(text)
        or _not_a_list(text)
        or _bad_lora(text)
        or explain_file(text)
        or _unknown_option(text)
        or _unknown_field(text)
        or _wrong_type(text)
        or _one_line(texts[-1] or texts[0])
    )


def typed(config: Any) -> Any:
    """A composed node as its dataclass. Raises UserError for a field that ``+`` added to one that has none such."""
    try:
        return OmegaConf.to_object(config)
    except AttributeError as error:  # OmegaConf's way to say so
        raise UserError(_unknown_attribute(error)) from error


def _unknown_attribute(error: AttributeError) -> str:
    """A field that ``+group.field=value`` added, though the option that stands there has none of that name."""
    from zimage_runner.config.registry import SCHEMAS

    match = re.search(r"'(?P<type>\w+)' object has no attribute '(?P<field>\w+)'", str(error))
    if match is None:
        raise error  # a mistake of ours
    options = {option.__name__: (group, option) for group, several in SCHEMAS.items() for option in several.values()}
    group, option = options.get(match["type"], ("", None))
    if elsewhere := _of_other_option(group, match["field"], match["type"]):
        return elsewhere
    fields = field_names(option) if option else []
    if match["type"] == "RunConfig":
        close = closest(match["field"], "")
        hint = f"; did you mean {'+' if close == 'experiment' else ''}{close}?" if close else "; see --help"
        return f"{match['field']}: no such field or group, and + cannot add one{hint}"
    close = difflib.get_close_matches(match["field"], fields, 1)
    hint = f"; did you mean {close[0]}?" if close else (f"; fields there: {', '.join(fields)}" if fields else "")
    return f"{match['field']}: no such field of {match['type']}, and + cannot add one{hint}"


def _of_other_option(group: str, field: str, chosen: str | None) -> str | None:
    """That other options of a group have this field, but not the dataclass ``chosen``."""
    options = ", ".join(options_with(group, field))
    told = f"{group}.{field}: not a field of {option_of(group, chosen)}, only of {options}: choose that or leave it out"
    return told if options else None


def _experiment_file(chain: list[BaseException]) -> str | None:
    error = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    return None if error is None else experiment_file(error.override)


def _no_assignment(text: str) -> str | None:
    """A word without an equals sign, such as ``dry_run`` for ``dry_run=true``."""
    match = re.search(r"Error parsing override '(?P<word>.*)'\s+missing EQUAL at", text, re.S)
    match = match or re.search(r"LexerNoViableAltException: (?P<word>[^=\n]+)$", text, re.M)
    if match is None:
        return None
    word = match["word"]
    if word in MEANT:
        return f"{word}: write {called(PROGRAM)} {MEANT[word]}"
    if (CONFIG_DIR / "experiment" / f"{word.lstrip('+')}.yaml").is_file():
        return f"{word}: write +experiment={word.lstrip('+')}"
    known = [*known_fields(""), *known_fields(word.rpartition(".")[0])]
    if word.rpartition(".")[2] in known:
        return f"{word}: write field=value, here {word}={_example(word)}"
    if word in COMMANDS:
        return f"{word}: a command is the first word: {called(PROGRAM)} {word} ..."
    close = difflib.get_close_matches(word, [*COMMANDS, *known], 1)
    if close and close[0] in COMMANDS:
        return f"{word}: no such command; did you mean {called(PROGRAM)} {close[0]}? Commands: {', '.join(COMMANDS)}"
    hint = (
        f"did you mean {close[0]}={_example(close[0])}?"
        if close
        else "for the text of a picture prompt='...', or see --help"
    )
    commands = "" if close or not word.isidentifier() else f"; commands: {', '.join(COMMANDS)}"
    return f"{word}: write field=value; {hint}{commands}"


def _example(field: str) -> str:
    return "latest" if field == "resume" else "true" if kind_of(field) == "bool" else "..."


def _bad_value(chain: list[BaseException]) -> str | None:
    """A value that Hydra's grammar has no reading for, such as an open bracket or letters that are not Latin."""
    error = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    if error is None or "=" not in error.override:
        return None
    key, _, value = error.override.partition("=")
    if not re.fullmatch(r"[+~]{0,2}[A-Za-z_$][\w$./@:-]*", key, re.ASCII):
        return f"{error.override}: {key} is no field's name; for the text of a picture prompt='...', or see --help"
    if value.startswith(("[", "{")):
        return f"{key}={value}: not readable as a list or mapping: look for a bracket or quotation mark not closed"
    quoted = re.sub("[\"']", "", value)
    return f"{key}={value}: not readable as a value: quote it twice, {key}='\"{quoted}\"'"


def _sweep_without_multirun(text: str) -> str | None:
    match = re.search(r"Ambiguous value for argument '(?P<key>[^=']+)=(?P<value>[^']*)'", text)
    match = match or re.search(r"Sweep parameters '(?P<key>[^=']+)=(?P<value>.*)' requires --multirun", text)
    if match is None:
        return None
    key, value = match["key"], match["value"]
    if called := re.fullmatch(r"range\((\d+),\s*(\d+)\)", value):
        first, last = int(called[1]), int(called[2]) - 1
        list_form = f"write {key}={first}-{last} for these seeds in one run, or " if key == "seeds" else ""
        return f"{key}={value}: {list_form}add -m to sweep over these values"
    if re.fullmatch(r"\w+\(.*\)", value, re.S):
        return f"{key}={value}: add -m to sweep over these values"
    kind = "" if key == "name" else kind_of(key)  # a folder's name has no comma
    if key == "seeds":
        return f"{key}={value}: write {key}='[{value}]' for all in one run, or add -m to sweep over these values"
    remedies = [f"write {key}='[{value}]' for a list"] if "list" in kind or "Any" in kind else []
    remedies += [f"write {key}='\"{value}\"' for text"] if "str" in kind or "Any" in kind else []
    told = f"{', '.join(remedies)}, or " if remedies else ""
    return f"{key}={value}: {told}add -m to sweep over these values"


def _no_option(text: str) -> str | None:
    match = re.search(r"`RunConfig` has missing mandatory value: (?P<group>\w+)", text)
    if match is None:
        return None
    group = match["group"]
    options = ", ".join(sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")))
    return f"~{group}: every run needs an option of this group: leave it out, or write {group}= and one of {options}"


def _not_a_list(text: str) -> str | None:
    if "is not a ListConfig, list or tuple" not in text:
        return None
    field = re.search(r"full_key: (\S+)", text)
    name = f"{file_of(text)}{field[1] if field else 'a field such as prompts.texts'}"
    return f"{name} takes a list: write [one, two], also for a single entry, and quote text that holds a comma or colon"


def _unknown_option(text: str) -> str | None:
    match = re.search(r"Could not find '(?P<option>[^']+)'(?P<rest>.*)", text, re.S)
    if not match:
        return None
    group, _, option = match["option"].rpartition("/")
    listed = re.findall(r"\t([^\n]+)", match["rest"].partition("Available options in")[2])
    options = [line for line in listed if "=" not in line]  # the search path follows, as provider=..., path=...
    named, _, file = match["option"].partition("/")
    if named == "experiment" and (told := experiment_file(f"+experiment={file}")):
        return told
    if not group or not options:
        return f"{option or match['option']}: no such config group or file; --help lists the groups"
    close = difflib.get_close_matches(option, options, 1)
    hint = f"did you mean {group}={close[0]}? " if close else ""
    if group == "prompts" and (kind := reader_of(PurePath(option).suffix.lower())):
        return f"{group}={option}: write prompts={kind} prompts.path={option}"
    if group == "output" and PurePath(option).suffix:
        return f"{group}={option}: write output_file={option} for a single picture, or output.root=FOLDER"
    return f"{group}={option}: no such option; {hint}available: {', '.join(options)}{misplaced(match['option'])}"


def _unknown_field(text: str) -> str | None:
    match = re.search(r"Key '(?P<key>[^']+)' (?:is )?not in (?:struct|'(?P<type>\w+)')", text)
    if not match:
        return None
    full_key = re.search(r"full_key: (\S+)", text)
    full = full_key[1] if full_key else match["key"]
    where = file_of(text)
    parent = full.rpartition(".")[0]
    if full == "server":
        return f"{where}server: its fields are of the command serve: {called(PROGRAM)} serve ..."
    if elsewhere := _of_other_option(parent, match["key"], match["type"]):
        return f"{where}{elsewhere}"
    if full == "experiment" and where:
        return missing_package(text)
    if match["type"] == "LoraFile":
        return f"{where}loras: {match['key']}: no such field; an entry has path and weight"
    known = known_fields(parent)
    if not parent and (remedy := OTHER_FIELDS.get(full)):
        return f"{where}{full}: no such field: {remedy}"
    if not parent and (groups := groups_with(match["key"])):
        return f"{where}{full}: no such field; did you mean {' or '.join(groups)}?{cfg_hint(match['key'])}"
    close = closest(match["key"], parent)
    hint = ""
    if close:
        hint = f"; did you mean {close}?{cfg_hint(match['key'])}"
    elif known:
        hint = f"; fields here: {', '.join(known)}"
    elif parent in known_fields(""):
        hint = f"; give it as a whole, {parent}=..."
    return f"{where}{full}: no such field{hint}"


def _bad_lora(text: str) -> str | None:
    """Something else than an entry where one of ``loras`` is needed."""
    match = re.search(r"is not a subclass of LoraFile\.\s+value: (?P<value>.*)", text)
    if match is not None and match["value"].strip() == "{}":
        return "loras has no entry of that number: name the files first, loras=[style.safetensors] loras.0.weight=0.5"
    if match is not None:
        entry = match["value"].strip()
        return f"{file_of(text)}loras: {entry} is no entry: write {{path: style.safetensors, weight: 0.8}}"
    if "reference_type=LoraFile" in text and "'None'" in text:
        return f"{file_of(text)}loras: an entry's path or weight is null: a weight that is left out is 1"
    return None


def _wrong_type(text: str) -> str | None:
    problems = "could not be converted to .*|is not .*|is incompatible with .*"
    match = re.search(rf"Value '(?P<value>.*?)' (?:of type '[^']*' )?(?P<problem>{problems})", text)
    full_key = re.search(r"full_key: (\S+)", text)
    if not match:
        match = re.search(r"Invalid value '(?P<value>.*?)', (?P<problem>expected one of .*)", text)
    if not match or not full_key:
        return None
    where = file_of(text)
    problem = match["problem"].strip()
    plain = next((words for sign, words in PLAIN_WORDS.items() if sign in problem), problem)
    return f"{where}{full_key[1]}={match['value']}: {plain}"


def _one_line(text: str) -> str:
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type=" not in line]
    return " ".join(line for line in lines if not line.startswith(("full_key:", "See https://hydra.cc")))
