"""The adapters of a run: which files its config and its prompts name, and that each is sound and fits the model."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zimage_runner.config.schema import LoraFile, RunConfig
from zimage_runner.errors import UserError, counted, one_line
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import MAX_LORA_WEIGHT, Lora
from zimage_runner.weights.adapters.adapter import lora_hash
from zimage_runner.weights.adapters.find import (
    AdapterFile,
    check_folders,
    component_shapes,
    files_below,
    find_adapter,
    read_checked,
)
from zimage_runner.weights.find.verify import file_digests


class LoraFinder:
    """Gives each prompt its adapters. Every file is opened once, read and checked, before anything is loaded."""

    def __init__(self, config: RunConfig, checkpoint: Path | None) -> None:
        """``checkpoint``: the model's files, which adapters must fit; None where they are not there yet."""
        check_folders(config.lora_dirs)
        self._folders = config.lora_dirs
        self._checkpoint = checkpoint
        self._files: dict[str, AdapterFile] = {}
        self._shapes = functools.cache(component_shapes)
        self._of_run = [
            self._lora(lora.path, lora.weight, f"loras.{place}.path") for place, lora in enumerate(config.loras)
        ]
        _refuse_twice(self._of_run, "loras")

    def __call__(self, prompt: Prompt) -> tuple[Lora, ...]:
        """Return the run's adapters with this prompt's own weights, then this prompt's; without those of weight 0."""
        own = [self._lora(word.name, word.weight, prompt.source) for word in prompt.loras]
        _refuse_twice(own, prompt.source)
        chosen = {lora.digest: lora for lora in self._weighed(prompt)}
        chosen.update({lora.digest: lora for lora in own})
        return tuple(lora for lora in chosen.values() if lora.weight)

    def _weighed(self, prompt: Prompt) -> list[Lora]:
        weights = prompt.lora_weights
        if not weights:
            return self._of_run
        if len(weights) > len(self._of_run):
            raise UserError(
                f"{prompt.source}: {len(weights)} LoRA weights, and the run has {counted(len(self._of_run), 'LoRA')}: "
                "loras=[FILE,...] names them"
            )
        # As sd-scripts does: the last weight goes on.
        spread = [*weights, *[weights[-1]] * (len(self._of_run) - len(weights))]
        return [replace(lora, weight=weight) for lora, weight in zip(self._of_run, spread, strict=True)]

    def _lora(self, name: str, weight: float, where: str) -> Lora:
        if not abs(weight) <= MAX_LORA_WEIGHT:
            raise UserError(
                f"{where}: the weight {weight:g} of {one_line(name, 80)} is out of range: "
                f"use {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}"
            )
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = self._checked(find_adapter(name, self._folders, where), where)
        return Lora(
            digest=file.sha256,
            weight=weight,
            name=file.path.stem,
            path=str(file.path),
            hash=lora_hash(file.tensors),
            encodes="text_encoder" in file.components,
        )

    def _checked(self, path: Path, where: str) -> AdapterFile:
        file = read_checked(path, where)
        if self._checkpoint is not None:
            for component in sorted(file.components):
                file.check(component, self._shapes(self._checkpoint, component))
        return file


def recorded_files(record: object, folders: Sequence[str], picture: str) -> list[LoraFile]:
    """Find the files that a picture was drawn with: where they were, else by their digest below ``folders``.

    ``record``: what ``Lora.record`` said of each, read from a file of anybody's. Raises UserError if one is gone or has
    changed.
    """
    entries: list[Any] = record if isinstance(record, list) else [record]
    return [LoraFile(path=str(_find(entry, folders, picture)), weight=float(entry["weight"])) for entry in entries]


def _find(entry: Any, folders: Sequence[str], picture: str) -> Path:
    kinds = {"path": str, "digest": str, "weight": int | float}
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{picture}: what its metadata says of its loras cannot be read: it cannot be reproduced")
    name, digest = one_line(entry["path"], 120), entry["digest"]
    path = Path(os.path.expanduser(entry["path"].replace("\0", "")))
    changed = False
    if path.is_file():
        if file_digests([path])[0].sha256 == digest:
            return path
        changed = True
    check_folders(folders)
    for folder in folders:
        files = files_below(Path(os.path.expanduser(folder)))
        # The same name first: it is most often the one, and the others need not be read.
        for file in sorted(files, key=lambda file: file.name != path.name):
            if file_digests([file])[0].sha256 == digest:
                return file
    what = "has changed since" if changed else "is not there"
    looked = f", and no file in {', '.join(folders)} has its sha256" if folders else ""
    raise UserError(
        f"{picture}: drawn with {name} (sha256 {one_line(digest, 13)}), which {what}{looked}: "
        "lora_dirs=[FOLDER] says where to look for it"
    )


def _refuse_twice(loras: Sequence[Lora], where: str) -> None:
    seen: set[str] = set()
    for lora in loras:
        if lora.digest in seen:
            raise UserError(f"{where}: {lora.path} is named twice: give it one weight")
        seen.add(lora.digest)
