"""prompts.jsonl of a run directory: the very prompts of the run, so that resuming needs no source file.

It is what ``prompts=jsonl`` reads, so that it can also start another run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.outputs.beneath import Inside
from zimage_runner.prompts.jsonl import MAX_OBJECT_BYTES, Jsonl, prompts_of_json_lines
from zimage_runner.prompts.prompt import Prompt
from zimage_runner.prompts.text import read_lines, shown

SNAPSHOT_NAME = "prompts.jsonl"
TYPED_NAME = "typed_pictures.jsonl"
"""Of the temporary table in which pictures of a command line become prompts: nobody has typed that path."""


@dataclass(kw_only=True, slots=True)
class Snapshot(Jsonl):
    """The prompts of a run that is resumed. Another source's file may be a link; a run's own may not."""

    def read(self) -> Iterator[Prompt]:
        assert self.path is not None
        file, name = Inside(Path(self.path).parent, Path(self.path).name), shown(self.path)
        try:
            with file.open() as stream:
                yield from prompts_of_json_lines(read_lines(stream, name, MAX_OBJECT_BYTES), name, self)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None


def snapshot(prompts: Iterable[Prompt]) -> bytes:
    """One JSON object a line."""
    return "".join(
        json.dumps(_row(place, prompt), ensure_ascii=False, separators=(",", ":")) + "\n"
        for place, prompt in enumerate(prompts)
    ).encode()


def _row(place: int, prompt: Prompt) -> dict[str, Any]:
    row: dict[str, Any] = {"index": place if prompt.index is None else prompt.index, "text": prompt.text}
    if prompt.id is not None:
        row["id"] = prompt.id
    row |= prompt.overrides
    if prompt.loras:
        row["loras"] = [f"{lora.name}:{lora.weight!r}" for lora in prompt.loras]
    if prompt.lora_weights:
        row["lora_weights"] = list(prompt.lora_weights)
    if prompt.seeds is not None:
        row["seeds"] = _runs(prompt.seeds)
    if prompt.metadata:
        row["metadata"] = dict(prompt.metadata)
    return row | {"source": prompt.source}


def _runs(seeds: Sequence[int]) -> list[int | str]:
    """Seeds with each run of five or more as "first-last": a million of them stay one short line."""
    written: list[int | str] = []
    start = 0
    for end in range(1, len(seeds) + 1):
        if end < len(seeds) and seeds[end] == seeds[end - 1] + 1:
            continue
        written += [f"{seeds[start]}-{seeds[end - 1]}"] if end - start >= 5 else seeds[start:end]
        start = end
    return written
