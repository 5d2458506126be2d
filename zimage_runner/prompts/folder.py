"""A folder of pictures to draw from: each with the prompt beside it, or the one that its own metadata holds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.outputs.config import IMAGE_STEM
from zimage_runner.prompts import images
from zimage_runner.prompts.base import INPUT, Prompt, RowSource, Wins
from zimage_runner.prompts.images import pictures_below, prompt_of_picture, says_how_it_was_drawn
from zimage_runner.prompts.text import check_text, decode_whole, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
SIDES = ("height", "width")


@dataclass(kw_only=True, slots=True)
class Folder(RowSource):
    """``prompts=folder prompts.path=photos``: every picture is redrawn, from cat.jpg with the prompt in cat.txt."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    wins: Wins = Wins.command_line
    """Where a picture and the command line both set a sampling field or the seeds: command_line, or row."""
    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The folder, with pictures at any depth, a run, or one picture; relative to where the program is started."""
    text: str | None = field(default=None, metadata=FREE_TEXT)
    """The prompt of every picture, instead of its own."""
    masks: str | None = field(default=None, metadata=FREE_TEXT)
    """A folder with the mask of each picture, under the same name but for the suffix."""

    def read(self) -> Iterator[Prompt]:
        if not self.path:
            raise UserError("prompts.path is not set: prompts=folder needs prompts.path=FOLDER")
        masks = None if self.masks is None else _masks_by_stem(Path(self.masks).expanduser())
        found = self._pictures(Path(self.path).expanduser())
        names = Counter(_name(file) for file in found)
        for file in found:
            prompt = self.prompt(file)
            if masks is not None:
                prompt = replace(prompt, overrides={**prompt.overrides, "mask": _mask_of(file, masks, str(self.masks))})
            name = _name(file)
            yield replace(prompt, id=name if names[name] == 1 else None)

    def _pictures(self, place: Path) -> list[Path]:
        if not place.is_dir():
            if not os.path.lexists(place):
                raise UserError(f"prompts.path={shown(place)} does not exist (looked for {shown(place.absolute())})")
            return [place]
        masks = None if self.masks is None else Path(self.masks).expanduser().absolute()
        found = sorted(file for file in pictures_below(place, SUFFIXES) if masks not in file.absolute().parents)
        if not found:
            raise UserError(f"prompts.path={shown(place)}: there is no picture ({', '.join(SUFFIXES)}) in this folder")
        return found

    def prompt(self, file: Path) -> Prompt:
        """The prompt of one picture, which starts from it and is drawn in its size. Raises UserError."""
        beside = file.with_suffix(".txt")
        own: dict[str, Any] = {}
        prompt = Prompt(text="", source=shown(file))
        if file.suffix.lower() in images.SUFFIXES and says_how_it_was_drawn(file):
            prompt = prompt_of_picture(file, inputs=False)
            own = {name: value for name, value in prompt.overrides.items() if name not in SIDES}
        if self.text is not None:
            text = check_text(self.text, "prompts.text")
        elif beside.is_file():
            text = check_text(decode_whole(beside), shown(beside))
        elif prompt.text:
            text = prompt.text
        else:
            raise UserError(
                f"{shown(file)} does not say what it shows, and there is no {beside.name} beside it: write its prompt "
                "there, or give prompts.text='...' for every picture"
            )
        return replace(prompt, text=text, overrides={**own, "image": str(file.absolute())})


def _name(file: Path) -> str:
    """What a picture is called: of a run's the folder of its prompt."""
    stem = file.stem if file.stem != IMAGE_STEM else f"{file.parent.parent.name}_{file.parent.name}"
    return stem[:256]


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"prompts.masks={shown(folder)} is no folder: give one with the masks in it")
    return {file.stem: file for file in sorted(pictures_below(folder, SUFFIXES))}


def _mask_of(file: Path, masks: dict[str, Path], folder: str) -> str:
    if file.stem not in masks:
        raise UserError(f"{shown(file)}: there is no mask of that name in prompts.masks={folder}: add {file.stem}.png")
    return str(masks[file.stem].absolute())
