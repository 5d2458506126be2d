"""``dry_run=true``: what a run would do, in words. Imports no torch and loads no model."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_runner import GB
from zimage_runner.errors import counted
from zimage_runner.logs import duration
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.run_dir import RECORD_BYTES
from zimage_runner.outputs.summary import one_line
from zimage_runner.outputs.survey import Progress
from zimage_runner.plan import Bucket, WorkItem
from zimage_runner.runner.spec import RunSpec

LISTED = 5
"""Prompts, truncations and duplicates that are named; the rest are counted."""
PROMPT_LENGTH = 80
"""Characters of a prompt in the plan."""
SHAPES_LISTED = 20
"""Shapes that are named, the largest first."""
RUNS_READ = 200
"""Earlier summaries looked at for the ETA, newest first."""


def describe(spec: RunSpec, progress: Progress | None = None, linked: Collection[str] = ()) -> str:
    """The plan as a table. ``progress``: what earlier processes did of it.

    ``linked``: directories of items whose picture ``skip_existing`` has.
    """
    progress = progress or Progress(todo=spec.plan.items)

    settled = progress.done | progress.skipped | set(linked)
    items = [item for item in spec.plan.items if item.item_dir not in settled] if settled else spec.plan.items
    rows = [("items", _items(spec, progress, len(linked), len(items)))]
    rows += _prompt_rows(spec)
    rows += _bucket_rows(spec, items)
    rows += _listed("loras", _loras(spec)) if spec.plan.loras() else []
    rows += _listed("pictures", pictures) if (pictures := _pictures(spec)) else []
    if (net := spec.checkpoint.controlnet) is not None:
        rows.append(("ControlNet", f"{net.path} ({net.layout.name})"))
    rows.append(("prompts to encode", f"{sum(1 for _ in replace(spec.plan, items=items).encodings()):,}"))
    rows.append(("caption tokens", _tokens(spec)))
    if spec.plan.caption_tokens:
        rows += _listed("truncated", [str(t) for t in spec.plan.truncations])
    rows += _listed("drawn twice", [_duplicate(d) for d in spec.plan.duplicates])
    if not spec.checkpoint.digest:
        rows.append(("weights", f"{spec.config.model.repo} is not downloaded yet"))
    rows.append(("disk", _disk(spec, items)))
    rows.append(("time", _eta(spec, items)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def work(item: WorkItem) -> float:
    """Transformer work of a picture: proportional to its pixels, steps, and twice that with guidance."""
    params = item.params
    return params.height * params.width * params.forwards * (2 if params.uses_guidance else 1)


def mean_work(items: Iterable[WorkItem]) -> float:
    """The average work of a picture."""
    return statistics.fmean([work(item) for item in items] or [0.0])


def _items(spec: RunSpec, progress: Progress, linked: int, remaining: int) -> str:
    total, prompts = len(spec.plan), len(spec.plan.prompts)
    text = f"{counted(total, 'picture')} of {counted(prompts, 'prompt')}"
    parts = [
        (len(progress.done), "done"),
        (len(progress.skipped), "not asked for (retry=failed)"),
        (linked, "in skip_existing and linked, where this machine computes as that run did"),
    ]
    told = [f"{counted(count, 'is', 'are')} {what}" for count, what in parts if count]
    return "; ".join([text, ", ".join([*told, counted(remaining, "remains", "remain")])]) if told else text


def _prompt_rows(spec: RunSpec) -> list[tuple[str, str]]:
    """The first prompts, as they are drawn."""
    prompts = spec.plan.prompts
    told = [one_line(prompt.text, PROMPT_LENGTH) for prompt in prompts[:LISTED]]
    told += [f"... and {len(prompts) - LISTED:,} more"] if len(prompts) > LISTED else []
    return [("" if n else "prompts", text) for n, text in enumerate(told)]


def _bucket_rows(spec: RunSpec, items: Iterable[WorkItem]) -> list[tuple[str, str]]:
    batch_size = spec.config.engine.largest_batch
    batches: dict[Bucket, tuple[int, int]] = {}
    for batch in spec.plan.batches(batch_size, items=items):
        drawn, count = batches.get(batch[0].bucket, (0, 0))
        batches[batch[0].bucket] = (drawn + len(batch), count + 1)
    rows = [
        (
            "batches",
            f"{sum(n for _, n in batches.values()):,} of at most {batch_size}, {counted(len(batches), 'shape')}",
        )
    ]
    told = [
        f"{counted(drawn, 'item')} in {counted(count, 'batch', 'batches')}: {bucket}"
        for bucket, (drawn, count) in batches.items()
    ]
    rows += [("", line) for line in told[:SHAPES_LISTED]]
    more = len(told) - SHAPES_LISTED
    return rows + ([("", f"... and {counted(more, 'more shape')}")] if more > 0 else [])


def _loras(spec: RunSpec) -> list[str]:
    return [f"{lora}: {counted(count, 'picture')}, {lora.path}" for lora, count in spec.plan.loras().items()]


def _pictures(spec: RunSpec) -> list[str]:
    """Each file that items start from, and for how many."""
    counts: dict[tuple[str, str, int, int], int] = {}
    for item in spec.plan.items:
        for name, picture in (item.params.inputs.files if item.params.inputs else {}).items():
            key = (name, picture.path, picture.width, picture.height)
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{name} {path}, {width}x{height}: {counted(count, 'picture')}"
        for (name, path, width, height), count in counts.items()
    ]


def _tokens(spec: RunSpec) -> str:
    counts = spec.plan.caption_tokens.values()
    if not counts:
        missing = "the weights are not there" if not spec.checkpoint.digest else "there is no tokenizer.json"
        return f"not counted, and so not what is cut off: {missing}"
    low, high = min(counts), max(counts)
    told = f"{low} each" if low == high else f"{low} to {high}, median {statistics.median(counts):g}"
    return f"{told if len(counts) > 1 else low} (chat template included)"


def _listed(name: str, lines: list[str]) -> list[tuple[str, str]]:
    if not lines:
        return [(name, "none")]
    more = [("", f"... and {len(lines) - LISTED:,} more")] if len(lines) > LISTED else []
    return [(name, f"{len(lines):,}"), *(("", one_line(line)) for line in lines[:LISTED]), *more]


def _duplicate(duplicate: Any) -> str:
    seeds = ",".join(map(str, duplicate.seeds[:5])) + (",..." if len(duplicate.seeds) > 5 else "")
    return f"{duplicate.prompt.source} is the same picture as {duplicate.first.source}, seed {seeds}"


def _disk(spec: RunSpec, items: list[WorkItem]) -> str:
    """What the pictures need, and whether the run would be refused for want of it."""
    root, needed, output = Path(spec.config.output.root).absolute(), _disk_bytes(spec, items), spec.config.output
    there = next((folder for folder in (root, *root.parents) if folder.exists()), root)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return f"about {_size(needed)} in {output.root}"
    enough = "" if free >= needed + output.min_free_gb * GB else ": NOT ENOUGH, the run would be refused"
    return f"about {_size(needed)} in {output.root}, {_size(free)} free{enough}"


def _disk_bytes(spec: RunSpec, items: list[WorkItem]) -> float:
    per_pixel = spec.config.output.estimated_bytes_per_pixel
    return sum(item.params.height * item.params.width * per_pixel + RECORD_BYTES for item in items)


def _size(number: float) -> str:
    for unit in ("KB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} TB"


@dataclass(frozen=True, slots=True)
class _EarlierRun:
    path: Path
    seconds: float
    """Per picture, in the steady state."""
    start: float
    """Seconds until the first picture could be drawn."""
    work: float
    device: str


def _eta(spec: RunSpec, items: list[WorkItem]) -> str:
    if not items:
        return "nothing to draw"
    earlier = _last_comparable(spec)
    if earlier is None:
        return "unknown: no earlier run of this model and engine to compare with"
    mine = mean_work(items)
    seconds = earlier.start + len(items) * earlier.seconds * mine / earlier.work
    scaled = "" if abs(mine - earlier.work) < 0.01 * earlier.work else ", scaled from its size and steps"
    each = f"{earlier.seconds:.2g} s a picture on {earlier.device}"
    return f"about {duration(seconds)}, going by {earlier.path} ({each}{scaled})"


def _last_comparable(spec: RunSpec) -> _EarlierRun | None:
    root = Path(spec.config.output.root)
    summaries = [*root.glob("*/*/summary.json"), *root.glob("multirun/*/*/*/summary.json")]
    summaries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in summaries[:RUNS_READ]:
        run = _read(path, spec)
        if run is not None:
            return run
    return None


def _read(path: Path, spec: RunSpec) -> _EarlierRun | None:
    """The run if it used the same weights and engine and drew at least two pictures."""
    try:
        summary = from_json(Inside(path.parent, path.name).read_bytes())
        comparable = summary["comparable"]
        if comparable["digest"] != spec.checkpoint.digest or comparable["engine"] != _engine_name(spec):
            return None
        seconds, start = summary["images"]["mean_seconds"], sum(summary["phases"].values())
        return _EarlierRun(path.parent, seconds, start, comparable["work"], summary["session"]["device_name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # another version's file, or one cut short: it cannot be compared


def comparable(spec: RunSpec) -> dict[str, Any]:
    """What summary.json keeps, so that a later run can be estimated from it."""
    return {"digest": spec.checkpoint.digest, "engine": _engine_name(spec), "work": mean_work(spec.plan.items)}


def _engine_name(spec: RunSpec) -> str:
    return type(spec.config.engine).__name__
