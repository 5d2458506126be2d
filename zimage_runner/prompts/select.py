"""From a source to the list of prompts of a run: offset, limit, sample, shard, and ids that are unique."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import NOTHING, Prompt, PromptSource, RowSource, Wins
from zimage_runner.prompts.foreign import warn_foreign
from zimage_runner.prompts.loras import take_tags
from zimage_runner.prompts.notes import once_a_run, warn_once
from zimage_runner.prompts.template import expand
from zimage_runner.prompts.text import shown


def read_prompts(source: PromptSource, *, lora_tags: bool = False) -> list[Prompt]:
    """All prompts of a run, in order. Raises UserError for bad input and when nothing is left to draw.

    ``lora_tags``: read ``<lora:name:0.8>``, which is text otherwise.
    """
    with once_a_run():
        prompts = _select(source)
        if isinstance(source, RowSource):
            prompts = settle(prompts, source)
        if lora_tags:
            prompts = [take_tags(prompt) for prompt in prompts]
        warn_foreign(prompts)
    return prompts


def _select(source: PromptSource) -> list[Prompt]:
    _check_names(source)
    _check_selection(source)
    shard = None if source.shard is None else _parse_shard(source.shard)
    stop = None if source.limit is None else source.offset + source.limit
    prompts = list(itertools.islice(expand(source.read(), source.template), source.offset, stop))
    if source.offset or source.sample is not None or shard is not None:
        # Folder names keep the number a prompt has in the whole source, so that parts of one set fit together.
        prompts = [replace(p, index=source.offset + n) if p.index is None else p for n, p in enumerate(prompts)]
    if source.sample is not None:
        prompts = _sample(prompts, source.sample, source.sample_seed)
    if shard is not None:
        prompts = prompts[shard[0] - 1 :: shard[1]]
    if not prompts:
        raise UserError(_why_nothing(source))
    _check_ids(prompts)
    _check_indices(prompts)
    return prompts


def settle(prompts: list[Prompt], source: RowSource) -> list[Prompt]:
    """Return the prompts, with or without their own values of fields that the command line sets too, and log which.

    ``source.typed`` names those fields, ``source.wins`` whose word holds.
    """
    lose = source.wins is Wins.command_line
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    settled = []
    for prompt in prompts:
        both = [name for name in source.typed if name in prompt.overrides or (name == "seeds" and prompt.seeds)]
        for name in both:
            first.setdefault(name, prompt.source)
        found.update(both)
        settled.append(_without(prompt, both) if lose and both else prompt)
    said = "the command line wins" if lose else "this wins over the command line; prompts.wins=command_line if not"
    for (where, count), names in itertools.groupby(found, lambda name: (first[name], found[name])):
        which = ", ".join(names)
        sets = f"{where} sets" if count == 1 else f"{where} and {count - 1:,} more set"
        warn_once(f"wins {which}", f"{sets} {which}: {said}")
    return settled


def _without(prompt: Prompt, names: Sequence[str]) -> Prompt:
    overrides = {name: value for name, value in prompt.overrides.items() if name not in names}
    return replace(prompt, overrides=overrides or NOTHING, seeds=None if "seeds" in names else prompt.seeds)


def _check_names(source: PromptSource) -> None:
    """A name that is not UTF-8 cannot be kept in the run's settings."""
    for name in ("path", "glob", "split"):
        value = getattr(source, name, None)
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            remedy = "rename the file, or read it with prompts=files prompts.glob='*.txt'"
            raise UserError(f"prompts.{name}={shown(value)}: the name is not UTF-8: {remedy}")


def _check_selection(source: PromptSource) -> None:
    for name, low in (("offset", 0), ("limit", 1), ("sample", 1)):
        value = getattr(source, name)
        if value is not None and value < low:
            raise UserError(f"prompts.{name}={value} is out of range: use {low} or more")
    if source.sample_seed and source.sample is None:
        raise UserError(f"prompts.sample_seed={source.sample_seed} has no effect without prompts.sample=COUNT: add it")


def _parse_shard(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"prompts.shard={shard!r} is not a shard: write 1/4, 2/4, 3/4 or 4/4 for one of four runs")
    return int(match[1]), int(match[2])


def _sample(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    if count >= len(prompts):
        return prompts
    # Random(int) and sample() are stable across Python versions and machines.
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), count))
    return [prompts[i] for i in chosen]


def _why_nothing(source: PromptSource) -> str:
    where = source.where()
    picks = {name: getattr(source, name) for name in ("offset", "limit", "sample", "shard")}
    used = " ".join(f"prompts.{name}={value}" for name, value in picks.items() if value)
    if used:
        return f"{used} leaves none of the prompts in {where}: take a larger part"
    return f"{where}: there are no prompts in it: put one a line"


def _check_ids(prompts: Iterable[Prompt]) -> None:
    first: dict[str, str] = {}
    for prompt in prompts:
        if prompt.id is None:
            continue
        if prompt.id in first:
            raise UserError(f"{prompt.source}: id={prompt.id!r} is already used at {first[prompt.id]}: make ids unique")
        first[prompt.id] = prompt.source


def _check_indices(prompts: Sequence[Prompt]) -> None:
    """Numbers decide folder names. They come with the prompts only from another run's prompts.jsonl."""
    if not any(prompt.index is not None for prompt in prompts):
        return
    first: dict[int, Prompt] = {}
    for place, prompt in enumerate(prompts):
        index = place if prompt.index is None else prompt.index
        if index in first:
            raise UserError(
                f"{prompt.source}: index={index} is already used at {first[index].source}: make indices unique"
            )
        first[index] = prompt
