"""Run measurements:

    python -m benchmarks.run main_job throughput --model /data/turbo --seconds 300
    python -m benchmarks.run all --tiny            # the embedded model on the CPU: does the harness work?

One JSON file per scenario is written to --results (default benchmarks/results), after every process anew.
``python -m benchmarks.report`` makes the page from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.harness import Results, measure
from benchmarks.scenarios import SCENARIOS, TINY
from benchmarks.variants import HERE, Work, ours


def main() -> None:
    args = _arguments()
    model = TINY if args.tiny else args.model
    work = Work(
        model=model,
        images=args.images,
        size=args.size or (128 if args.tiny else 1024),
        steps=args.steps,
        device=args.device or ("cuda" if machine.is_cuda() else "cpu"),
    )
    if args.tiny:
        # Digests of an earlier version's embedded model may lie in the user's cache.
        os.environ.setdefault("ZIMAGE_RUNNER_CACHE", tempfile.mkdtemp(prefix="bench_cache_"))
    facts = _facts(args.machine)
    for name in list(SCENARIOS) if args.scenario == ["all"] else args.scenario:
        scenario = SCENARIOS[name](work)
        extra = [ours(label, *shlex.split(text)) for label, _, text in (e.partition(":") for e in args.ours)]
        variants = [v for v in [*extra, *scenario.variants] if not args.only or v.name in args.only or v in extra]
        scenario = dataclasses.replace(
            scenario,
            variants=variants,
            rounds=args.rounds or scenario.rounds,
            caches=args.cache or (("warm",) if args.tiny else scenario.caches),
        )
        print(f"== {scenario.title}\n   expected: {scenario.prediction}", flush=True)
        path = args.results / f"{name}{args.suffix}.json"
        results = Results(scenario, path, facts)
        measure(scenario, results, args.seconds, {"published": model})
        results.write()
        print(f"   {len(results.runs)} processes -> {path}", flush=True)


def _facts(kept: Path | None) -> dict[str, Any]:
    """This machine's description; its matmul rate is measured once per session and kept."""
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    facts = machine.describe() | {"bf16_matmul_tflops": machine.matmul_tflops()}
    if kept is not None:
        kept.write_text(json.dumps(facts))
    return facts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="+", choices=[*SCENARIOS, "all"])
    parser.add_argument("--model", type=Path, help="diffusers-format directory (benchmarks/synthetic_checkpoint.py)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model at 128x128: tries the harness")
    parser.add_argument("--seconds", type=float, default=600, help="budget of each scenario")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="processes of each contestant")
    parser.add_argument("--cache", action="append", choices=("warm", "dropped"), help="page cache before each process")
    parser.add_argument("--only", action="append", default=[], help="a contestant's name; may be repeated")
    parser.add_argument("--ours", action="append", default=[], help="'name: overrides' of another contestant")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--machine", type=Path, help="file that keeps the machine's description between calls")
    parser.add_argument("--suffix", default="", help="added to the results' file names")
    args = parser.parse_args()
    if not args.tiny and args.model is None:
        parser.error("give --model DIRECTORY, or --tiny")
    return args


if __name__ == "__main__":
    main()
