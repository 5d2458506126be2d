"""Pictures named on the command line become the prompts of an ordinary run: what ``vary`` and ``enlarge`` share."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from zimage_runner.cli.fields import prompt_inputs
from zimage_runner.cli.resume.command_line import folder_named
from zimage_runner.cli.resume.saved import override_key
from zimage_runner.collect.pictures import find_runs, marked, pictures_of
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import EXIT_BAD_INPUT, EXIT_OK, PROGRAM, UserError, called
from zimage_runner.executors.handing import draw
from zimage_runner.logs import check_words, log_to_terminal, refuse
from zimage_runner.prompts.images import controlnet_of_picture, recipe_of_picture
from zimage_runner.prompts.prompt import Prompt
from zimage_runner.prompts.snapshot import TYPED_NAME, snapshot

Fields = dict[str, str]


def run_from(
    argv: Sequence[str],
    doc: str,
    name: str,
    fields: Sequence[str],
    prompt_of: Callable[[Path, Fields, Set[str]], Prompt],
) -> int:
    """Start the run that draws ``prompt_of`` each picture that ``argv`` names. Return its exit code.

    ``fields``: the command's own, besides ``starred``; all other words are the run's. ``prompt_of`` takes a picture,
    those fields and the names of the sampling fields among the other words, which win over the picture's.
    """
    from zimage_runner.cli.main import main

    if not argv or {"-h", "--help"} & set(argv):
        print(called(doc))
        return EXIT_OK if argv else EXIT_BAD_INPUT
    log_to_terminal()
    try:
        check_words(argv, (*fields, "starred"))
        places, own, words = _parse(argv, (*fields, "starred"))
        pictures = _pictures(places, own)
        typed = {override_key(word).removeprefix("sampling.") for word in words}
        prompts = [prompt_of(picture, own, typed) for picture in pictures]
        words = [*_model(pictures, words), *_controlnet(prompts, pictures, words), *words]
    except UserError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"{error.filename or 'a file'}: {error.strerror}")
    with tempfile.TemporaryDirectory(prefix="zimage_runner_") as folder:
        table = Path(folder) / TYPED_NAME
        table.write_bytes(snapshot(prompts))  # the run keeps its own copy, with which it is resumed
        words = ["prompts=jsonl", f"prompts.path={table}", "prompts.wins=command_line", f"name={name}", *words]
        return draw(words, lambda: main(words))


def number(fields: Fields, name: str, default: float, low: float, high: float) -> float:
    """A field as a number. Raises UserError."""
    text = fields.get(name, str(default))
    if not re.fullmatch(r"[0-9]{0,6}\.?[0-9]{0,6}", text) or not text.strip(".") or not low <= float(text) <= high:
        raise UserError(f"{name}={text}: write a number from {low:g} to {high:g}")
    return float(text)


def _parse(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], Fields, list[str]]:
    """Pictures and runs, the command's fields, and the words for the run."""
    places: list[str] = []
    own: Fields = {}
    words: list[str] = []
    of_the_pictures = ("prompt", "prompts", *(f"prompts.{name}" for name in prompt_inputs()))
    for word in argv:
        match = re.fullmatch(r"(?s)(\w+)=(.*)", word)
        if match is not None and match[1] in names:
            own[match[1]] = match[2]
        elif re.match(r"[+~]?[\w./@]+=|-", word):
            if override_key(word) in of_the_pictures:
                raise UserError(
                    f"{word} has no effect on pictures, which are drawn with their own prompts: leave it out, or draw "
                    "PICTURE with another one: prompts=folder prompts.path=PICTURE prompts.text=TEXT"
                )
            words.append(word)
        else:
            places.append(word)
    if not places:
        raise UserError("no picture is named: give picture files, run directories, folders of runs, or latest")
    return places, own, words


def _pictures(places: Sequence[str], fields: Fields) -> list[Path]:
    starred = fields.get("starred", "false").lower()
    if starred not in ("true", "false"):
        raise UserError(f"starred={fields['starred']}: write true or false")
    found: list[Path] = []
    for place in places:
        path = folder_named(place)
        if path.is_file():
            found.append(path)
            continue
        if not path.exists():
            raise UserError(f"{place} does not exist: name a picture, a run directory or a folder of runs")
        chosen = list(marked(pictures_of(find_runs([path])), starred=starred == "true", rejected=True))
        if any(one.place is not None for one in chosen):
            raise UserError(
                f"{place} has its pictures in shards, and this command takes files: collect them first, "
                f"{called(PROGRAM)} collect {place} into=FOLDER"
            )
        found += [one.path for one in chosen]
    if not found:
        what = f"is starred; {called(PROGRAM)} view marks them" if starred == "true" else "is finished there yet"
        raise UserError(f"{' '.join(places)}: no picture {what}")
    return found


def _model(pictures: Sequence[Path], words: Sequence[str]) -> list[str]:
    """The model that drew the pictures, where nothing else is asked for. Raises UserError for several."""
    if any(re.match(r"(model|\+?experiment)=", word) for word in words):
        return []
    recipes: list[dict[str, Any]] = [recipe for file in pictures if (recipe := recipe_of_picture(file))]
    names = {str(recipe.get("model", {}).get("name")) for recipe in recipes if isinstance(recipe.get("model"), dict)}
    known = sorted(name for name in names if name.isidentifier() and (CONFIG_DIR / "model" / f"{name}.yaml").is_file())
    if len(known) > 1:
        raise UserError(f"the pictures were drawn by several models ({', '.join(known)}): choose one, model={known[0]}")
    return [f"model={known[0]}"] if known else []


def _controlnet(prompts: Sequence[Prompt], pictures: Sequence[Path], words: Sequence[str]) -> list[str]:
    """The ControlNet of pictures that follow theirs again, where none is named. Raises UserError for several."""
    if any(re.match(r"\+{0,2}model\.controlnet=", word) for word in words):
        return []
    steered = [file for prompt, file in zip(prompts, pictures, strict=True) if "control_image" in prompt.overrides]
    found = {controlnet_of_picture(file) for file in steered}
    if len(found) > 1:
        raise UserError("the pictures were drawn with several ControlNets: vary those of one at a time")
    return [
        word
        for path, convention in found
        for word in (f"model.controlnet={path}", f"model.controlnet_convention={convention.value}")
    ]
