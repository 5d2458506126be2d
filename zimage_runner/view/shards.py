"""Runs that are shards of one set (``prompts.shard=1/4``): which belong together, and how far the set is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zimage_runner.view.folder import Folder
from zimage_runner.view.runs import read_settings
from zimage_runner.view.state import describe_sweep

OF_ONE_RUN = ("name", "output", "output_file", "resume", "retry", "verify", "skip_existing", "dry_run", "log",
              "executor", "memory", "warmup", "embedding_cache", "report")  # fmt: skip
"""Fields and groups in which the shards of a set may differ: they change no picture."""
MOST = 10_000
"""Shards of a set whose missing ones are listed."""
_SHARD = re.compile(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A run that is one."""

    path: str
    number: int
    of: int
    settings: str
    """All that the set's runs have in common."""
    seen: Mapping[str, Any]
    """What ``RunState.describe`` says of the run."""


def shard_of(folder: Folder, run: Mapping[str, Any], path: str) -> Shard | None:
    """What ``run`` (as ``RunState.describe`` describes it) is a shard of; None for others and for a multirun's jobs."""
    config = read_settings(folder, run["path"]).config if run["sweep"] is None else {}
    prompts = config.get("prompts")
    match = _SHARD.fullmatch(str(prompts.get("shard"))) if isinstance(prompts, dict) else None
    if match is None or not isinstance(prompts, dict):
        return None
    same = {key: value for key, value in config.items() if key not in OF_ONE_RUN}
    same["prompts"] = {key: value for key, value in prompts.items() if key != "shard"}
    settings = json.dumps(same, sort_keys=True, default=str)
    return Shard(path=path, number=int(match[1]), of=int(match[2]), settings=settings, seen=run)


def sets_of(shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """Sets of two and more. Where a shard was started twice, the second run belongs to a second set."""
    found: list[dict[int, Shard]] = []
    for shard in shards:
        for others in found:
            first = next(iter(others.values()))
            if (first.settings, first.of) == (shard.settings, shard.of) and shard.number not in others:
                others[shard.number] = shard
                break
        else:
            found.append({shard.number: shard})
    return [_described(others) for others in found if len(others) > 1]


def _described(found: Mapping[int, Shard]) -> dict[str, Any]:
    shards = [found[number] for number in sorted(found)]
    of = shards[0].of
    missing = [number for number in range(1, min(of, MOST) + 1) if number not in found]
    seen = describe_sweep("", [dict(shard.seen) for shard in shards], of)
    waited = [shard.seen["left_seconds"] for shard in shards if shard.seen["left_seconds"]]
    took = [shard.seen["seconds"] for shard in shards if shard.seen["seconds"]]
    return seen | {
        "of": of,
        "runs": {str(shard.number): shard.path for shard in shards},
        "missing": missing,
        "left_seconds": max(waited, default=None),  # they draw side by side
        "seconds": None if seen["state"] == "running" else max(took, default=None),
    }
