"""Evaluate a checkpoint: `python -m training.evaluate`, every case in about twenty minutes on two CPU cores.

Prints and saves a table: retrieval on the committed cases at 8 and at 4 forwards, which phrasings miss, how much seeds
differ, time and size. Needs nothing but the checkpoint and the committed reference. `evaluate.limit=20` gives a quick
look; `evaluate.engine=diffusers` draws with plain diffusers.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow a busy machine 20-fold

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cases import Case, load_cases, load_reference
from training.config import EvaluateConfig, TrainingConfig, command
from training.drawing import OPENERS, Draw, in_batches
from training.render import contact_sheet
from training.scoring import Judge


def choose(cases: list[Case], name: str, limit: int) -> tuple[list[Case], list[int], int]:
    """(cases, their seeds, forwards) of a set; `NAME@4` means 4 forwards, `limit` picks that many at random.

    Always the same ones; not every n-th, which would meet a few of the phrasings only. A case's seed is its place in
    the whole set, so that a limited run draws the same pictures.
    """
    steps = int(name.partition("@")[2] or 8)
    members = [c for c in cases if c.set == name.partition("@")[0]]
    places = sorted(random.Random(0).sample(range(len(members)), min(limit or len(members), len(members))))
    return [members[i] for i in places], places, steps


def by_phrasing(cases: list[Case], misses: list[str]) -> dict[str, str]:
    """Misses of each phrasing of a held-out set, worst first: phrasing -> "misses of cases"."""
    missed, of, shown = Counter[int](), Counter[int](), set(misses)
    for case in cases:
        of[case.phrasing] += 1
        missed[case.phrasing] += case.prompt in shown
    templates = cases[0].templates
    return {templates[k]: f"{n} of {of[k]}" for k, n in missed.most_common() if n} if templates else {}


def retrieval(draw: Draw, judge: Judge, chosen: tuple[list[Case], list[int], int], batch: int) -> tuple[dict, Tensor]:
    """Score of one set of cases, as a table row, and the pictures."""
    cases, seeds, steps = chosen
    start = time.time()
    images = in_batches(draw, [c.prompt for c in cases], seeds, steps, batch)
    seconds = (time.time() - start) / len(cases)
    score = judge.score(cases, images)
    row = asdict(score) | {"steps": steps, "seconds_per_image": round(seconds, 3)}
    return row | {"missed_phrasings": by_phrasing(cases, score.misses)}, images


def seed_variety(draw: Draw, judge: Judge, cases: list[Case], batch: int) -> dict:
    """Four seeds of each case: the mean distance between them, and how many still show the right thing.

    `distance` is RMS over 48x48 pixels in [0, 2] between pictures of one prompt.
    """
    prompts = [c.prompt for c in cases for _ in range(4)]
    images = in_batches(draw, prompts, [11, 12, 13, 14] * len(cases), 8, batch)
    small = F.interpolate(images, size=48, mode="area").flatten(1)
    distances = [torch.pdist(four).mean().item() / small.shape[1] ** 0.5 for four in small.split(4)]
    ranks = judge.ranks(images, [c.right[0] for c in cases for _ in range(4)])
    top1 = sum(rank == 0 for rank in ranks) / len(ranks)
    return {"cases": len(cases), "distance": round(sum(distances) / len(distances), 4), "top1": round(top1, 4)}


def save(table: dict[str, Any], out: Path) -> None:
    """Write the table so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def measure(e: EvaluateConfig, reference: Path) -> dict[str, Any]:
    """The whole table, saved after each set."""
    start = time.time()
    draw = OPENERS[e.engine](e.model, e.device, getattr(torch, e.dtype))
    load_seconds = round(time.time() - start, 3)
    size = sum(f.stat().st_size for f in Path(e.model).rglob("*.safetensors")) / 1e6
    thumbs, names = load_reference(reference)
    judge = Judge(thumbs, [n["flippable"] for n in names], e.device)
    cases = load_cases(reference)
    table: dict[str, Any] = {
        "engine": e.engine, "dtype": e.dtype, "device": e.device, "threads": torch.get_num_threads(),
        "load_seconds": load_seconds, "weights_megabytes": round(size, 2),
    }  # fmt: skip
    for name in e.sets:
        chosen = choose(cases, name, e.limit)
        row, images = retrieval(draw, judge, chosen, e.batch)
        table[name] = row
        parts = " ".join(f"{k} {v:.3f}" for k, v in row["parts"].items())
        print(f"{name:12s} top1 {row['top1']:.3f} top5 {row['top5']:.3f} of {row['cases']:3d} {parts}"
              f" {row['seconds_per_image']:.3f} s each", flush=True)  # fmt: skip
        save(table, Path(e.out))
        if e.sheets:
            Path(e.sheets).mkdir(parents=True, exist_ok=True)
            contact_sheet(images[:96], 12).save(Path(e.sheets) / f"{name}.jpg", quality=88)
    if e.seeds:
        table["seeds"] = seed_variety(draw, judge, choose(cases, "bare", e.seeds)[0], e.batch)
        print(f"seeds        {table['seeds']}", flush=True)
        save(table, Path(e.out))
    return table


def main(cfg: TrainingConfig) -> None:
    """Evaluate and write `evaluate.out`."""
    if cfg.evaluate.threads:
        torch.set_num_threads(cfg.evaluate.threads)
    measure(cfg.evaluate, Path(cfg.data.reference))
    print(f"wrote {cfg.evaluate.out}")


if __name__ == "__main__":
    command(main)
