"""prompts.jsonl of a run directory: the very prompts of the run, so that resuming needs no source file.

It is what ``prompts=jsonl`` reads, so that it can also start another run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from zimage_runner.prompts.prompt import Prompt

SNAPSHOT_NAME = "prompts.jsonl"


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
    if prompt.seeds is not None:
        row["seeds"] = list(prompt.seeds)
    if prompt.metadata:
        row["metadata"] = dict(prompt.metadata)
    return row | {"source": prompt.source}
