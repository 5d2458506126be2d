"""How long a scenario will take, from what processes took on one H200: to share out a rented machine's time.

These are estimates for the plan alone; no figure of the page comes from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.variants import Variant, Work

if TYPE_CHECKING:
    from benchmarks.harness import Scenario

END = 1.7
"""Seconds from the last picture to the end of the process."""
NAIVE_FIRST, DIFFUSERS_FIRST, NATIVE_FIRST = 21.0, 21.0, 6.5
COMPILE_SECONDS = {"regional": 25.0, "full": 60.0}
FROM_CACHE = 10.0
"""Of the compiler, when its cache knows the code."""
AUTOTUNE = 60.0
DROPPED = {"naive": 34.0, "native": 9.0, "diffusers": 15.0}
"""More seconds when nothing is in the page cache."""
SMALLEST = 0.2
"""A picture of any size, beside one of 1024x1024, takes at least this share of its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Processes of one contestant under one state of the page cache."""

    variant: str
    cache: str
    processes: int
    """Uncounted ones included."""
    seconds_each: float

    @property
    def seconds(self) -> float:
        return self.processes * self.seconds_each


def expected(scenario: Scenario) -> list[Expected]:
    """What the whole scenario would take, contestant by contestant."""
    found = []
    for number, cache in enumerate(scenario.caches):
        for variant in scenario.variants:
            if cache not in variant.caches:
                continue
            primings = int(variant.primed and number == 0 and not _filled_by_another(variant, scenario))
            found.append(
                Expected(
                    variant=variant.name,
                    cache=cache,
                    processes=scenario.rounds_of(variant) + primings,
                    seconds_each=process_seconds(variant, scenario.work, cache),
                )
            )
    return found


def _filled_by_another(variant: Variant, scenario: Scenario) -> bool:
    before = scenario.variants[: list(scenario.variants).index(variant)]
    return any(set(variant.keeps.values()) & set(other.keeps.values()) for other in before)


def process_seconds(variant: Variant, work: Work, cache: str = "warm") -> float:
    """One process, from its start to its end; 0 on the CPU, where nobody waits for it."""
    if work.device != "cuda":
        return 0.0
    images = work.images if variant.images is None else variant.images
    scale = max(SMALLEST, work.size**2 / 1024**2)
    first, each = _first_and_later(variant)
    dropped = DROPPED[_kind(variant)] if cache == "dropped" else 0.0
    return first + dropped + (images - 1) * each * scale + END


def _kind(variant: Variant) -> str:
    if variant.script is not None:
        return "naive"
    return "diffusers" if "engine=diffusers" in (variant.overrides or ()) else "native"


def _first_and_later(variant: Variant) -> tuple[float, float]:
    """Seconds to the first 1024x1024 picture, and for each after it."""
    if variant.script is not None:
        return (40.0, 1.2) if variant.script.startswith("tuned") else (NAIVE_FIRST, 1.5)
    overrides = set(variant.overrides or ())
    if _kind(variant) == "native":
        return NATIVE_FIRST - (0.5 if "embedding_cache.path" in variant.keeps else 0.0), 0.75
    first, each = DIFFUSERS_FIRST + sum(_compile_seconds(variant, overrides)), 1.4
    if "warmup=generate" in overrides or "warmup=article" in overrides:
        first += 1.5
    if "memory=sequential_offload" in overrides:
        first, each = first + 15.0, 16.0
    elif overrides & {"memory=group_offload", "memory=model_offload"}:
        first, each = first + 5.0, 4.0
    return first, each


def _compile_seconds(variant: Variant, overrides: set[str]) -> Iterator[float]:
    target = next((o.partition("=")[2] for o in overrides if o.startswith("compile=")), "none")
    if target in COMPILE_SECONDS:
        yield COMPILE_SECONDS[target] if variant.starts_empty or not variant.keeps else FROM_CACHE
        if "compile.mode=max-autotune" in overrides:
            yield AUTOTUNE


def describe(scenario: Scenario) -> str:
    """The plan in lines, for --plan."""
    plan = expected(scenario)
    lines = [f"== {scenario.name}: {sum(e.seconds for e in plan):.0f} s expected"]
    total = 0.0
    for e in plan:
        total += e.seconds
        each = f"{e.processes:2} x {e.seconds_each:5.1f} s = {e.seconds:6.1f} s"
        lines.append(f"   {e.variant:45} {e.cache:8} {each}, {total:5.0f} s in all")
    if "dropped" in scenario.caches:
        lines.append("   drops the page cache: nothing else may run on the machine meanwhile")
    return "\n".join(lines)
