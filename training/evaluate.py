"""Evaluate a checkpoint with plain diffusers: `python -m training.evaluate`, on two CPU cores in about ten minutes.

Prints and saves a table: retrieval on the committed cases at 8 and at 4 forwards, how much seeds differ, VAE quality, time
and size. Needs nothing but the checkpoint and the committed reference. `evaluate.limit=20` gives a quick look.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cases import Case, load_cases, load_reference
from training.config import EvaluateConfig, TrainingConfig, command
from training.render import contact_sheet
from training.scoring import Judge


def generate(pipe: Any, prompts: list[str], seeds: list[int], steps: int, batch: int, guidance: float = 0.0) -> Tensor:
    """Pictures [B, 3, 128, 128] in [-1, 1], one generator each."""
    parts = []
    for k in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[k : k + batch]]
        out = pipe(
            list(prompts[k : k + batch]), height=128, width=128, num_inference_steps=steps, guidance_scale=guidance,
            generator=generators, output_type="pt",
        )  # fmt: skip
        parts.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def retrieval(pipe: Any, judge: Judge, cases: list[Case], steps: int, cfg: EvaluateConfig) -> tuple[dict, Tensor]:
    """Score of one set of cases, as a table row, and the pictures."""
    start = time.time()
    images = generate(pipe, [c.prompt for c in cases], list(range(len(cases))), steps, cfg.batch)
    seconds = (time.time() - start) / len(cases)
    row = asdict(judge.score(cases, images)) | {"steps": steps, "seconds_per_image": round(seconds, 3)}
    return row, images


def seed_variety(pipe: Any, judge: Judge, cases: list[Case], cfg: EvaluateConfig) -> dict:
    """Four seeds of each case: the mean distance between them, and how many still show the right thing.

    `distance` is RMS over 48x48 pixels in [0, 2] between pictures of one prompt; `mirrored` the share of prompts with
    pictures facing both ways.
    """
    distances, right, total = [], 0, 0
    for case in cases:
        images = generate(pipe, [case.prompt] * 4, [11, 12, 13, 14], 8, cfg.batch)
        small = F.interpolate(images, size=48, mode="area").flatten(1)
        distances.append(torch.pdist(small).mean().item() / small.shape[1] ** 0.5)
        right += sum(rank == 0 for rank in judge.ranks(images, [case.right[0]] * 4))
        total += 4
    return {"cases": len(cases), "distance": round(sum(distances) / len(distances), 4), "top1": right / total}


def load_pipeline(cfg: EvaluateConfig) -> tuple[Any, float]:
    """(pipeline, seconds to load)."""
    from diffusers import ZImagePipeline

    start = time.time()
    pipe = ZImagePipeline.from_pretrained(cfg.model, torch_dtype=getattr(torch, cfg.dtype))
    seconds = time.time() - start
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(cfg.device), seconds


def main(cfg: TrainingConfig) -> None:
    """Evaluate and write `evaluate.out`."""
    e = cfg.evaluate
    if e.threads:
        torch.set_num_threads(e.threads)
    pipe, load_seconds = load_pipeline(e)
    thumbs, names = load_reference(Path(cfg.data.reference))
    judge = Judge(thumbs, [n["flippable"] for n in names], e.device)
    cases = load_cases(Path(cfg.data.reference))
    table: dict[str, Any] = {"model": e.model, "dtype": e.dtype, "device": e.device, "load_seconds": round(load_seconds, 3)}
    files = [f for f in Path(e.model).rglob("*") if f.is_file()]
    table["megabytes"] = round(sum(f.stat().st_size for f in files) / 1e6, 2)
    for name in e.sets:
        steps = 4 if name.endswith("@4") else 8
        chosen = [c for c in cases if c.set == name.removesuffix("@4")]
        chosen = chosen[:: max(1, len(chosen) // e.limit)][: e.limit] if e.limit else chosen
        table[name], images = retrieval(pipe, judge, chosen, steps, e)
        row = table[name]
        print(f"{name:12s} top1 {row['top1']:.3f} top5 {row['top5']:.3f} of {row['cases']:3d} {row['parts'] or ''}"
              f" {row['seconds_per_image']:.3f} s", flush=True)  # fmt: skip
        if e.sheets:
            Path(e.sheets).mkdir(parents=True, exist_ok=True)
            contact_sheet(images[:96], 12).save(Path(e.sheets) / f"{name}.jpg", quality=88)
    if e.seeds:
        table["seeds"] = seed_variety(pipe, judge, [c for c in cases if c.set == "bare"][: e.seeds], e)
        print(f"seeds        {table['seeds']}", flush=True)
    Path(e.out).parent.mkdir(parents=True, exist_ok=True)
    Path(e.out).write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {e.out}")


if __name__ == "__main__":
    command(main)
