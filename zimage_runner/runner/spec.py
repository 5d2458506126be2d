"""From a validated config to the spec of a run: plan, checkpoint and session. Generates nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_runner.config.schema import RunConfig
from zimage_runner.engines.device import warn_without_gpu
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.engines.request import Needs
from zimage_runner.errors import UserError
from zimage_runner.logs import quiet
from zimage_runner.memory.policies import Auto
from zimage_runner.model import Device
from zimage_runner.outputs.beneath import Inside
from zimage_runner.plan import CountTokens, Encoding, FindLoras, Plan, WorkItem, build_plan
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.base import Prompt, PromptSource
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.seeds import Seeds, parse_seeds
from zimage_runner.prompts.snapshot import SNAPSHOT_NAME, TYPED_NAME, Snapshot, snapshot
from zimage_runner.prompts.text import is_there, shown
from zimage_runner.sampling import PICTURE_FIELDS, SamplingParams, resolve_sampling
from zimage_runner.session import SessionConfig
from zimage_runner.warmup import WarmupShape
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.controlnet import find_controlnet
from zimage_runner.weights.find.resolve import needs_hub, resolve, resolve_without_network
from zimage_runner.weights.formats.controlnet import PUBLISHED

UNTRUNCATED = 1 << 24
MOST_AHEAD = 20_000
"""Captions that ``memory=auto`` has encoded before the first picture, and kept: 0.3 to 2.6 MB of host memory each."""
NOT_DOWNLOADED = Checkpoint(path=Path(os.devnull), revision="not downloaded", digest="")
"""Stands in for the weights in a dry run before the first download: nothing is fetched to make a plan."""
IDLE_CONTROLNET = "idle controlnet"
"""The kind of warning that a ControlNet follows nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """All that defines a run, checked and ready to start."""

    config: RunConfig
    plan: Plan
    checkpoint: Checkpoint
    session: SessionConfig

    @property
    def shapes(self) -> list[WarmupShape]:
        """Each shape of the plan, for warm-up: size, guidance on or off, batch size, padded caption lengths.

        The first caption length of a size is drawn to the end, further ones a step; compiled code needs them all whole,
        and so does a guidance that is switched off within the loop.
        """
        counts, engine = self.plan.buckets(), self.config.engine
        shapes: dict[tuple[Any, ...], WarmupShape] = {}
        sizes: set[tuple[Any, ...]] = set()
        last = None
        for item in self.plan.items:
            params, bucket = item.params, item.bucket
            if bucket is last:
                continue
            last = bucket
            batch = 1 if engine.auto_batch else min(engine.largest_batch, counts[bucket])
            size = (params.height, params.width, params.uses_guidance, batch)
            key = (*size, bucket.caption_tokens, bucket.negative_caption_tokens, params.kind)
            if key in shapes:
                continue
            changes_within = params.uses_guidance and params.cfg_truncation < 1
            shapes[key] = WarmupShape(
                params=params,
                caption_tokens=bucket.caption_tokens,
                negative_caption_tokens=bucket.negative_caption_tokens,
                batch_size=batch,
                whole=size not in sizes or self.config.compile.specializes or changes_within,
            )
            sizes.add(size)
        return list(shapes.values())

    @property
    def texts(self) -> list[Encoding]:
        """What the session wants to know of the plan's captions beforehand; nothing unless it makes a difference."""
        config = self.config
        wanted, most = config.memory.wants_captions, None
        if isinstance(config.memory, Auto):
            wanted, most = config.engine.device is not Device.cpu, MOST_AHEAD + 1
        if config.embedding_cache.path is not None:
            wanted, most = True, None
        found = list(itertools.islice(self.plan.encodings(), most)) if wanted else []
        return found if most is None or len(found) < most else []

    @property
    def output_file(self) -> Path | None:
        """Where the single picture goes as well: a whole path, for runs that work in their own directory."""
        return None if self.config.output_file is None else Path(os.path.abspath(self.config.output_file))

    @property
    def recipe(self) -> Recipe:
        """What makes the recipe of each item."""
        model, checkpoint = self.config.model, self.checkpoint
        of_model = {
            "name": model.name,
            "repo": model.repo,
            "revision": checkpoint.revision,
            "digest": checkpoint.digest,
            **({"files": model.places} if model.is_assembled else {}),
        }
        return Recipe(of_model)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Says of an item all that decides its picture. Small: it crosses to the workers that write."""

    model: Mapping[str, Any]
    """Name, repository, revision and digest of its model; the files, where it was put together from such."""

    def __call__(self, item: WorkItem, report: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the item's picture; goes into its record and its PNG."""
        prompt = item.prompt
        return {
            "prompt": prompt.text,
            "params": item.params.to_dict(),
            "seed": item.seed,
            "model": dict(self.model),
            **({"loras": [lora.record() for lora in item.params.loras]} if item.params.loras else {}),
            **({"inputs": item.params.inputs.record()} if item.params.inputs else {}),
            "numerics": report["numerics"],
            "versions": report["versions"],
            **({"id": prompt.id} if prompt.id is not None else {}),
            **({"metadata": dict(prompt.metadata)} if prompt.metadata else {}),
        }


def check(config: RunConfig) -> tuple[SamplingParams, Seeds]:
    """Check what can be checked of a run without reading prompts or weights. Return sampling parameters and seeds.

    Raises UserError.
    """
    params = resolve_sampling(config.sampling, config.model.recommended)
    config.model.check_size(params.height, params.width)
    seeds = parse_seeds(config.seeds)
    config.engine.check(Needs.of(config.model, config.memory, config.compile, [params]))
    prompt_source(config)
    return params, seeds


def plan_run(config: RunConfig, memo: dict[str, Any] | None = None) -> RunSpec:
    """Validate everything that can be without torch, read the prompts, find the weights, and plan. Return the spec.

    ``memo`` keeps what the next run of the same sweep needs again: the checkpoint's digest and its tokenizer.
    Raises UserError with one line for whatever the user can mend.
    """
    params, seeds = check(config)
    source = prompt_source(config)
    # A run's own prompts.jsonl has its prompts' adapters beside their texts.
    prompts = read_prompts(source, lora_tags=_reads_lora_tags(config) and not isinstance(source, Snapshot))
    memo = {} if memo is None else memo
    _once(
        memo,
        f"no GPU {config.model.name} {config.engine.device}",
        lambda: warn_without_gpu(config.model, config.engine),
    )

    def planned(checkpoint: Checkpoint) -> Plan:
        count_tokens = _once(memo, f"tokens {checkpoint.path}", lambda: token_counter(checkpoint.path))
        finder = _lora_finder(config, prompts, checkpoint)
        plan = _expand(config, prompts, seeds, params, count_tokens, finder, checkpoint.controlnet)
        config.engine.check(Needs.of(config.model, config.memory, config.compile, plan.params()))
        if config.output_file is not None and len(plan) > 1:
            raise UserError(
                f"output_file={config.output_file!r} takes one picture, but this run draws {len(plan)}: "
                "give one prompt and one seed, or leave output_file out"
            )
        return plan

    checkpoint = _once(memo, f"checkpoint {config.model} {config.dry_run}", lambda: _checkpoint(config, planned))
    session = session_config(config, checkpoint)
    return RunSpec(config=config, plan=planned(checkpoint), checkpoint=checkpoint, session=session)


def _expand(config: RunConfig, prompts: Sequence[Prompt], seeds: Seeds, params: SamplingParams, *tools: Any) -> Plan:
    """Expand the prompts; their pictures, if they have any, are checked.

    ``tools`` count tokens and find adapters; the last is the ControlNet.
    """
    count_tokens, find_loras, controlnet = tools
    with contextlib.ExitStack() as opened:
        find_inputs = None
        if any(getattr(config.sampling, name) is not None for name in PICTURE_FIELDS) or any(
            not p.overrides.keys().isdisjoint(PICTURE_FIELDS) for p in prompts
        ):
            from zimage_runner.runner.inputs import InputFinder

            find_inputs = opened.enter_context(contextlib.closing(InputFinder(config, prompts, controlnet)))
        plan = build_plan(
            prompts,
            seeds,
            params,
            check_size=config.model.check_size,
            count_tokens=count_tokens,
            find_loras=find_loras,
            find_inputs=find_inputs,
        )
        if find_inputs is not None:
            find_inputs.check_used(plan.params())
    if controlnet is not None and not any(one.inputs and one.inputs.control_image for one in plan.params()):
        warn_once(
            IDLE_CONTROLNET,
            f"model.controlnet={controlnet.path} steers nothing here: no prompt has a control_image "
            "(sampling.control_image=FILE gives all of them one)",
        )
    return plan


def _lora_finder(config: RunConfig, prompts: Sequence[Prompt], checkpoint: Checkpoint) -> FindLoras | None:
    """Return what gives each prompt its adapters; None where no prompt has any. Raises UserError for a bad file."""
    if not (config.loras or config.lora_dirs or any(prompt.loras or prompt.lora_weights for prompt in prompts)):
        return None
    from zimage_runner.runner.loras import LoraFinder

    return LoraFinder(config, checkpoint.path if checkpoint.digest else None)


def session_config(config: RunConfig, checkpoint: Checkpoint) -> SessionConfig:
    """Return the part of a run's config that its session is made of."""
    return SessionConfig(
        model=config.model,
        engine=config.engine,
        memory=config.memory,
        warmup=config.warmup,
        compile=config.compile,
        checkpoint=checkpoint,
        embedding_cache=config.embedding_cache,
    )


def executor_key(config: RunConfig, checkpoint: Checkpoint | None = None) -> str:
    """Return a key that is equal for runs which can share one executor and its session.

    Before the weights are found (no ``checkpoint``) the model's settings stand for them.
    """
    return repr((config.executor, session_config(config, checkpoint or NOT_DOWNLOADED).key()))


def _checkpoint(config: RunConfig, planned: Callable[[Checkpoint], Plan]) -> Checkpoint:
    """Find the weights. Before gigabytes are fetched, ``planned`` finds what is wrong with all the rest."""
    if config.dry_run:
        return resolve_without_network(config.model) or _not_downloaded(config)
    if needs_hub(config.model):
        heard = quiet.set(True)  # the plan with the weights tells what there is to tell
        try:
            planned(_not_downloaded(config))
        finally:
            quiet.reset(heard)
    return resolve(config.model)


def _not_downloaded(config: RunConfig) -> Checkpoint:
    return replace(NOT_DOWNLOADED, controlnet=find_controlnet(config.model, PUBLISHED))


def _reads_lora_tags(config: RunConfig) -> bool:
    return bool(config.loras or config.lora_dirs)


def check_same_prompts(config: RunConfig, directory: Path) -> None:
    """Raise UserError if the source given anew has other prompts than the run that is resumed.

    A source that is gone has none: the run has its own.
    """
    file = Inside(directory, SNAPSHOT_NAME)
    if isinstance(config.prompts, Inline) or not file.is_file():
        return
    where = config.prompts.where()
    heard = quiet.set(True)  # what there is to warn of is told when the run's own are read
    try:
        now = _rows(snapshot(read_prompts(config.prompts, lora_tags=_reads_lora_tags(config))))
    except UserError:
        if is_there(where):
            raise
        return
    finally:
        quiet.reset(heard)
    was = _rows(file.read_bytes())
    if was != now:
        first = next((n for n, (old, new) in enumerate(zip(was, now, strict=False)) if old != new), None)
        first = min(len(was), len(now)) if first is None else first
        typed = Path(where).name == TYPED_NAME
        source = "the named pictures, or their n, amount, strength or scale, give" if typed else f"{shown(where)} has"
        raise UserError(
            f"resume={directory}: {source} other prompts than the run began with ({len(was):,} then, "
            f"{len(now):,} now; the first that differs is number {first}): resume it without prompts to finish what "
            "it began with, or start a new run"
        )


def _rows(lines: bytes) -> list[bytes]:
    """Lines of prompts.jsonl without what they end with, which is where each prompt came from."""
    return [line.rpartition(b',"source":')[0] for line in lines.splitlines()]


def _once(memo: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    if key not in memo:
        memo[key] = make()
    return memo[key]


def token_counter(checkpoint: Path) -> CountTokens | None:
    """Counts caption tokens, template included and not truncated; None where the checkpoint has no tokenizer.json."""
    folder = checkpoint / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = CaptionTokenizer(folder)
    return lambda texts: [len(ids) for ids in tokenizer(texts, UNTRUNCATED)]


def prompt_source(config: RunConfig) -> PromptSource:
    """``prompt=TEXT`` stands for an inline source of one prompt; both at once are refused.

    A resumed run has its prompts beside its pictures.
    """
    if config.resume is not None and os.path.lexists(saved := Path(config.resume) / SNAPSHOT_NAME):
        return Snapshot(path=str(saved))
    if config.prompt is None:
        return config.prompts
    if isinstance(config.prompts, Inline) and not config.prompts.texts:
        return replace(config.prompts, texts=[config.prompt])
    raise UserError("prompt and prompts are both set: use prompt=TEXT for one prompt, or the prompts group for many")
