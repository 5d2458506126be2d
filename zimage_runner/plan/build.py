"""Prompts x seeds become a plan. Pure: the same input gives the same plan on every machine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zimage_runner.errors import UserError, counted
from zimage_runner.model import padded_length
from zimage_runner.plan.items import Bucket, WorkItem
from zimage_runner.plan.plan import Duplicate, Plan, Truncation
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.seeds import Seeds
from zimage_runner.sampling import SAMPLING_FIELDS, Lora, SamplingParams

log = logging.getLogger(__name__)

MAX_ITEMS = 10_000_000
_TEXTS_AT_ONCE = 1024

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Caption tokens of each text, chat template included, before truncation."""
FindLoras = Callable[[Prompt], tuple[Lora, ...]]
"""The adapters that a prompt is drawn with."""
FindInputs = Callable[[Prompt], Mapping[str, Any]]
"""The pictures that a prompt starts from, as ``inputs``, and sides that follow from them; nothing where it has none."""


def build_plan(
    prompts: Sequence[Prompt],
    seeds: Seeds,
    params: SamplingParams,
    *,
    check_size: Callable[[int, int], None],
    count_tokens: CountTokens | None = None,
    find_loras: FindLoras | None = None,
    find_inputs: FindInputs | None = None,
) -> Plan:
    """Expand prompts x seeds. Raises UserError, naming the prompt's line, for sampling that cannot be drawn.

    ``find_loras`` gives each prompt's adapters, ``find_inputs`` its pictures; None where there can be none.
    """
    _check_count(prompts, seeds)
    resolved = _resolve(prompts, params, check_size, find_loras, find_inputs)
    counts = _count(prompts, resolved, count_tokens)
    buckets = _buckets(prompts, resolved, counts)
    rank = _rank(buckets)
    order = sorted(range(len(prompts)), key=lambda i: rank[id(buckets[i])])
    items = [
        WorkItem(
            prompt_index=number,
            seed=seed,
            prompt=prompts[i],
            params=resolved[i],
            bucket=buckets[i],
        )
        for i, number in ((i, _number(prompts[i], i)) for i in order)
        for seed in _seeds_of(prompts[i], seeds)
    ]
    return Plan(
        items=items,
        prompts=list(prompts),
        truncations=_truncations(prompts, resolved, counts),
        duplicates=_duplicates(prompts, resolved, seeds),
        caption_tokens=counts,
    )


def _rank(buckets: Sequence[Bucket]) -> dict[int, int]:
    """Place of each bucket, by its id: those of one set of adapters together, within them the largest first.

    Another set of adapters costs a change of weights, so each set has one turn: first what needs none, then as the
    prompts come.
    """
    unique = dict.fromkeys(buckets)
    turns = {loras: turn for turn, loras in enumerate(dict.fromkeys([(), *(b.params.loras for b in unique)]))}
    largest_first = sorted(unique, key=lambda b: b.cost, reverse=True)
    ordered = sorted(largest_first, key=lambda b: turns[b.params.loras])
    return {id(bucket): place for place, bucket in enumerate(ordered)}


def _number(prompt: Prompt, place: int) -> int:
    return place if prompt.index is None else prompt.index


def _seeds_of(prompt: Prompt, seeds: Seeds) -> tuple[int, ...]:
    return seeds.for_text(prompt.text) if prompt.seeds is None else prompt.seeds


def _check_count(prompts: Sequence[Prompt], seeds: Seeds) -> None:
    count = sum(len(seeds) if p.seeds is None else len(p.seeds) for p in prompts)
    if count > MAX_ITEMS:
        raise UserError(
            f"{counted(len(prompts), 'prompt')} x seeds are {count:,} pictures: use at most {MAX_ITEMS:,} a run, "
            "or split it with prompts.shard"
        )


def _resolve(
    prompts: Sequence[Prompt],
    params: SamplingParams,
    check_size: Callable[[int, int], None],
    find_loras: FindLoras | None,
    find_inputs: FindInputs | None,
) -> list[SamplingParams]:
    """Each prompt's sampling; prompts with equal overrides share one instance."""
    check_size(params.height, params.width)
    shared: dict[tuple[Any, ...], SamplingParams] = {} if find_loras or find_inputs else {((), (), ()): params}
    resolved = []
    for prompt, overrides in zip(prompts, _without_idle_negatives(prompts, params), strict=True):
        key = (tuple(sorted(overrides.items())), prompt.loras, prompt.lora_weights)
        if key not in shared:
            own = {"loras": find_loras(prompt)} if find_loras else {}
            given = {name: value for name, value in overrides.items() if name in SAMPLING_FIELDS}
            try:
                own |= find_inputs(prompt) if find_inputs else {}
                shared[key] = params.overridden({**given, **own})
                check_size(*shared[key].whole_or_tile)
            except UserError as error:
                raise UserError(f"{prompt.source}: {error}") from None
        resolved.append(shared[key])
    return resolved


def _without_idle_negatives(prompts: Sequence[Prompt], params: SamplingParams) -> list[Mapping[str, Any]]:
    """Each prompt's overrides, without the negative prompts that do nothing because there is no guidance; told once."""
    found, idle = [], []
    for prompt in prompts:
        overrides = prompt.overrides
        negative = overrides.get("negative_prompt", params.negative_prompt)
        if negative and not overrides.get("guidance_scale", params.guidance_scale) > 0:
            overrides = {**overrides, "negative_prompt": ""}
            idle.append(prompt)
        found.append(overrides)
    if idle:
        where = (idle[0].source or "prompt") + (f" and {len(idle) - 1:,} more" if len(idle) > 1 else "")
        log.warning(
            "%s: the negative prompt does nothing with guidance_scale=0 and is left out: set guidance_scale above 0 to "
            "use it, with a model that takes guidance",
            where,
        )
    return found


def _count(
    prompts: Sequence[Prompt], resolved: Sequence[SamplingParams], count_tokens: CountTokens | None
) -> dict[str, int]:
    """Caption tokens of each unique text; empty when they cannot be counted."""
    if count_tokens is None:
        return {}
    unique = dict.fromkeys(p.text for p in prompts)
    unique |= dict.fromkeys(params.negative_prompt for params in set(resolved) if params.uses_guidance)
    texts = list(unique)
    counts: dict[str, int] = {}
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[start : start + _TEXTS_AT_ONCE]
        counts.update(zip(part, count_tokens(part), strict=True))
    return counts


def padded(tokens: int, max_sequence_length: int) -> int:
    """Caption length after truncation and the transformer's own padding."""
    return padded_length(min(tokens, max_sequence_length))


def _buckets(prompts: Sequence[Prompt], resolved: Sequence[SamplingParams], counts: Mapping[str, int]) -> list[Bucket]:
    """Each prompt's bucket; equal buckets are one instance, so that batches compare by identity."""
    shared: dict[tuple[int, int, int], Bucket] = {}
    unique: dict[Bucket, Bucket] = {}
    result = []
    for prompt, params in zip(prompts, resolved, strict=True):
        length = params.max_sequence_length
        caption = padded(counts.get(prompt.text, 0), length)
        negative = padded(counts.get(params.negative_prompt, 0), length) if params.uses_guidance else 0
        key = (id(params), caption, negative)
        if key not in shared:
            bucket = Bucket.of(params, caption, negative)
            shared[key] = unique.setdefault(bucket, bucket)
        result.append(shared[key])
    return result


def _truncations(
    prompts: Sequence[Prompt], resolved: Sequence[SamplingParams], counts: Mapping[str, int]
) -> list[Truncation]:
    found = []
    for prompt, params in zip(prompts, resolved, strict=True):
        texts = {"text": prompt.text} | ({"negative_prompt": params.negative_prompt} if params.uses_guidance else {})
        for name, text in texts.items():
            tokens = counts.get(text, 0)
            if tokens > params.max_sequence_length:
                found.append(
                    Truncation(prompt=prompt, field=name, tokens=tokens, max_sequence_length=params.max_sequence_length)
                )
    return found


def _duplicates(prompts: Sequence[Prompt], resolved: Sequence[SamplingParams], seeds: Seeds) -> list[Duplicate]:
    """Pictures that an earlier prompt of the plan already draws."""
    occurrences = Counter(zip((p.text for p in prompts), resolved, strict=True))
    drawn: dict[tuple[str, SamplingParams, int], Prompt] = {}
    found = []
    for prompt, params in zip(prompts, resolved, strict=True):
        if occurrences[prompt.text, params] == 1:
            continue
        again: dict[int, Prompt] = {}
        for seed in _seeds_of(prompt, seeds):
            first = drawn.setdefault((prompt.text, params, seed), prompt)
            if first is not prompt:
                again[seed] = first
        if again:
            found.append(Duplicate(prompt=prompt, first=next(iter(again.values())), seeds=tuple(again)))
    return found
