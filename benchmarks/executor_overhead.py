"""What executor=process or executor=ray costs beside executor=inline: seconds per picture at batch 1.

    python -m benchmarks.executor_overhead [--of ray] [--blocks 20] [--pictures 8] [overrides ...]

The embedded model on the CPU, unless overrides say otherwise (model=zimage_turbo on a GPU).

Both executors are warm and take turns in short blocks, so that a busy machine disturbs both alike. The figure is the
median over pairs of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time

from benchmarks import machine
from benchmarks.variants import composed
from zimage_runner.executors.base import Batch, Executor
from zimage_runner.runner.spec import RunSpec, plan_run
from zimage_runner.session import Session

QUICKSTART = "+experiment=quickstart"
LIMITS = {"process": 0.03, "ray": 0.02}
"""The overhead that the project allows itself."""


def main() -> int:
    parser = argparse.ArgumentParser(description="executor=process or ray beside executor=inline")
    parser.add_argument("--of", choices=sorted(LIMITS), default="process", help="the executor that is measured")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each executor")
    parser.add_argument("--pictures", type=int, default=8, help="pictures in a block")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    specs = {kind: plan_run(composed(QUICKSTART, f"executor={kind}", *args.overrides)) for kind in ("inline", args.of)}
    executors = {kind: start(spec) for kind, spec in specs.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in executors}
    try:
        for block in range(args.blocks + 1):
            for kind in sorted(executors, reverse=block % 2 == 1):
                took = draw(executors[kind], specs[kind], args.pictures)
                if block:  # the first one warms up
                    seconds[kind].append(took)
    finally:
        for executor in executors.values():
            executor.close()
    result = compare(seconds, args.of)
    machine.report(result, None)
    return 0 if result["overhead"] <= LIMITS[args.of] else 1


def start(spec: RunSpec) -> Executor:
    executor = spec.config.executor.create(
        functools.partial(Session, spec.config.executor.adapt(spec.session), spec.shapes, spec.texts)
    )
    executor.start()
    return executor


def draw(executor: Executor, spec: RunSpec, pictures: int) -> float:
    """Seconds per picture, pixels on the host."""
    items = [spec.plan.items[n % len(spec.plan.items)] for n in range(pictures)]
    started = time.perf_counter()
    for result in executor.run(Batch(items=[item]) for item in items):
        assert result.images is not None, result.error
        result.images.wait()
    return (time.perf_counter() - started) / pictures


def compare(seconds: dict[str, list[float]], kind: str) -> dict[str, float]:
    ratios = [other / inline for inline, other in zip(seconds["inline"], seconds[kind], strict=True)]
    return {
        "inline_seconds_per_image": statistics.median(seconds["inline"]),
        f"{kind}_seconds_per_image": statistics.median(seconds[kind]),
        "overhead": statistics.median(ratios) - 1,
        "blocks": len(ratios),
    }


if __name__ == "__main__":
    sys.exit(main())
