"""Run measurements:

    python -m benchmarks.run throughput cold_start --model /data/turbo --seconds 300
    python -m benchmarks.run all --tiny            # the embedded model on the CPU: does the harness work?

Two scenarios may run at a time, each on a GPU of its own (CUDA_VISIBLE_DEVICES=0 and 1), with one --model and one
--machine file: say so with --note. Not while the page cache is dropped (cold_start without --cache warm).

One JSON file per scenario is written to --results (default benchmarks/results), after every process anew.
``python -m benchmarks.report`` makes the page from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine
from benchmarks.harness import Results, Scenario, measure
from benchmarks.scenarios import FULL_SIZE, IMAGES, SCENARIOS, TINY
from benchmarks.variants import HERE, Variant, Work, ours

TINY_IMAGES = 3


def main() -> None:
    args = _arguments()
    names = [name for name in SCENARIOS if not (args.tiny and name in FULL_SIZE)]
    scenarios = [_scenario(name, args) for name in (names if args.scenario == ["all"] else args.scenario)]
    if args.tiny:
        # Digests of an earlier version's embedded model may lie in the user's cache.
        os.environ.setdefault("ZIMAGE_RUNNER_CACHE", tempfile.mkdtemp(prefix="bench_cache_"))
    facts = machine.facts(args.machine)
    for scenario in scenarios:
        _prepare(scenario)
        print(f"== {scenario.title}\n   expected: {scenario.prediction}", flush=True)
        path = args.results / f"{scenario.name}{args.suffix}.json"
        results = Results(scenario, path, facts, args.note)
        measure(scenario, results, args.seconds)
        results.write()
        print(f"   {len(results.runs)} processes -> {path}", flush=True)


def _scenario(name: str, args: argparse.Namespace) -> Scenario:
    """The scenario with what the command line changes of it."""
    work = Work(
        model=TINY if args.tiny else args.model,
        images=args.images or (TINY_IMAGES if args.tiny else IMAGES.get(name, 8)),
        size=args.size or (128 if args.tiny else 1024),
        steps=args.steps,
        device=args.device or ("cuda" if machine.is_cuda() else "cpu"),
    )
    scenario = SCENARIOS[name](work)
    extra = [ours(label, *shlex.split(text)) for label, _, text in (e.partition(":") for e in args.ours)]
    variants = [v for v in [*extra, *scenario.variants] if not args.only or v.name in args.only or v in extra]
    if not variants:
        raise SystemExit(f"{name} has no such contestant: its are {', '.join(v.name for v in scenario.variants)}")
    if args.images or args.tiny:
        variants = [_at_most(variant, 2 * work.images) for variant in variants]
    return dataclasses.replace(
        scenario,
        variants=variants,
        rounds=args.rounds or (1 if args.tiny else scenario.rounds),
        caches=args.cache or (("warm",) if args.tiny else scenario.caches),
    )


def _prepare(scenario: Scenario) -> None:
    """Make the prepared copy that its contestants begin with, unless it is there."""
    if scenario.work.device != "cuda":
        return
    native = [v for v in scenario.variants if v.overrides is not None and "engine=diffusers" not in v.overrides]
    command = [sys.executable, "-m", "zimage_runner.prepare", "build", "model=local"]
    command.append(f"model.path={scenario.work.model}")
    if native:
        subprocess.run(command, check=True, env=native[0].environment())


def _at_most(variant: Variant, images: int) -> Variant:
    return variant if variant.images is None else dataclasses.replace(variant, images=min(variant.images, images))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="+", choices=[*SCENARIOS, "all"])
    parser.add_argument("--model", type=Path, help="diffusers-format directory (benchmarks/synthetic_checkpoint.py)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model at 128x128: tries the harness")
    parser.add_argument("--seconds", type=float, default=600, help="budget of each scenario")
    parser.add_argument("--images", type=int, help="pictures of each process (default: the scenario's)")
    parser.add_argument("--size", type=int, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="processes of each contestant")
    parser.add_argument("--cache", action="append", choices=("warm", "dropped"), help="page cache before each process")
    parser.add_argument("--only", action="append", default=[], help="a contestant's name; may be repeated")
    parser.add_argument("--ours", action="append", default=[], help="'name: overrides' of another contestant")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--machine", type=Path, help="file that keeps the machine's description between calls")
    parser.add_argument("--note", default="", help="shown under the table: what else ran on the machine")
    parser.add_argument("--suffix", default="", help="added to the results' file names")
    args = parser.parse_args()
    if not args.tiny and args.model is None:
        parser.error("give --model DIRECTORY, or --tiny")
    return args


if __name__ == "__main__":
    main()
