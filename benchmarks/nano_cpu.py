"""The embedded model on the CPU: engine=native beside engine=diffusers, seconds per picture at batch 1.

    python benchmarks/nano_cpu.py [--pictures 20] [--threads 2] [--output FILE]

Both engines are warm and draw the same picture in turn, so that a busy machine disturbs both alike. Every picture has a
caption of its own; a run that draws several seeds of one caption encodes it once, which ``ratio_denoise_decode`` shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.executor_overhead import compose_job
from zimage_runner.engines.base import Engine
from zimage_runner.engines.request import DenoiseRequest
from zimage_runner.engines.threads import wait_passively
from zimage_runner.runner.spec import RunSpec
from zimage_runner.session import Session

PHASES = ("encode", "denoise", "decode")
PREDICTION = (
    "Expected, from the same comparison by hand: on two idle cores diffusers takes 0.25 s and native 0.12 s, twice as "
    "fast with the caption's encoding and 1.9 times without it: matrix products and convolutions, which both must "
    "compute, are two thirds of native's time."
)


def main() -> int:
    parser = argparse.ArgumentParser(description="engine=native beside engine=diffusers, embedded model, CPU")
    parser.add_argument("--pictures", type=int, default=20, help="pictures of each engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    wait_passively()  # as a session does, before torch is there
    import torch

    torch.set_num_threads(args.threads)
    sessions = {name: start(name) for name in ("diffusers", "native")}
    rows: dict[str, list[list[float]]] = {name: [] for name in sessions}
    for seed in range(-2, args.pictures):  # the first two warm up
        for name, (session, spec) in sessions.items():
            row = draw(session.engine, spec, max(seed, 0))
            if seed >= 0:
                rows[name].append(row)
    result = {"prediction": PREDICTION, "threads": args.threads, "pictures": args.pictures, **compare(rows)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0


def start(engine: str) -> tuple[Session, RunSpec]:
    spec = compose_job([f"engine={engine}", "engine.device=cpu", "warmup=none"])
    session = Session(spec.session, spec.shapes, spec.texts)
    session.start()
    return session, spec


def draw(engine: Engine, spec: RunSpec, seed: int) -> list[float]:
    """Seconds of each phase of one picture, pixels on the host."""
    from zimage_runner.engines.request import draw_noise  # imports torch

    params = spec.plan.items[0].params
    scale = engine.vae_scale_factor
    times = [time.perf_counter()]
    embeds = engine.encode([f"a red apple {seed}"], params.max_sequence_length)
    times.append(time.perf_counter())
    noise = draw_noise([seed], engine.latent_channels, params.height // scale, params.width // scale)
    latents = engine.denoise(
        DenoiseRequest(prompt_embeds=embeds, negative_prompt_embeds=None, noise=noise, params=params)
    )
    times.append(time.perf_counter())
    engine.decode(latents).wait()
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def compare(rows: dict[str, list[list[float]]]) -> dict[str, object]:
    """Minimum and median of each phase and engine, and the median over pictures of diffusers' time by native's."""
    result: dict[str, object] = {}
    for name, engine_rows in rows.items():
        columns = dict(zip(PHASES, zip(*engine_rows))) | {"picture": [sum(row) for row in engine_rows]}
        result[name] = {
            phase: {"min": min(values), "median": statistics.median(values)} for phase, values in columns.items()
        }
    for label, first in (("ratio", 0), ("ratio_denoise_decode", 1)):
        pairs = zip(rows["diffusers"], rows["native"], strict=True)
        result[label] = statistics.median(sum(slow[first:]) / sum(fast[first:]) for slow, fast in pairs)
    return result


if __name__ == "__main__":
    sys.exit(main())
