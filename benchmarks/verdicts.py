"""A verdict on each of the article's claims, from the ablation's figures and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.statistics_of import Row, Spread

FEW = 3
"""Processes of a contestant whose spread is not worth much yet."""
BETWEEN_PROCESSES = {"first_png": 0.35, "seconds_per_image": 0.05, "jitter": 1.0, "peak_reserved": 0.01}
"""By how much single processes that do the same were seen to differ: 19.3 to 26.3 s to the first picture (imports, on a
shared host), 1.31 to 1.36 s a picture, any jitter of three intervals. Of so few, only larger differences count."""
LEAST_SHARE = 0.02
"""Differences below 2 % are no effect, however small the spread of so few processes happens to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Something the article says a step does: ``variant`` against ``baseline`` lowers ``metric``."""

    text: str
    variant: str
    baseline: str
    metric: str
    unit: str = "s"
    short: str = ""
    """In the README's summary; claims without are on the page alone."""


CLAIMS = [
    Claim(
        text="step 1 (allocator settings) lowers peak memory",
        variant="step 1: allocator",
        baseline="plain",
        metric="peak_reserved",
        unit="GB",
        short="step 1, peak memory",
    ),
    Claim(
        text="step 1 makes later images steadier (jitter)",
        variant="step 1: allocator",
        baseline="plain",
        metric="jitter",
    ),
    Claim(
        text="step 2 (CPU first, then one move) shortens the way to the first picture (article: 14.7 to 4.6 s)",
        variant="step 2: CPU first",
        baseline="plain",
        metric="first_png",
        short="step 2, first picture",
    ),
    Claim(
        text="loading straight to the GPU, which step 2 advises against, shortens the way to the first picture",
        variant="direct loading",
        baseline="plain",
        metric="first_png",
    ),
    Claim(
        text="step 3 corrected (compile the transformer, then warm up) makes later images faster (article: 18 %)",
        variant="step 3 corrected, compiled before",
        baseline="plain",
        metric="seconds_per_image",
        short="step 3 corrected, later pictures",
    ),
    Claim(
        text="step 3's compilation costs 2 to 3 s once: the first picture is not later",
        variant="step 3 corrected: compile, then warm up",
        baseline="plain",
        metric="first_png",
        short="step 3 corrected, first picture",
    ),
    Claim(
        text="the same with the compiler's cache of an earlier run",
        variant="step 3 corrected, compiled before",
        baseline="plain",
        metric="first_png",
    ),
    Claim(
        text="step 3 as printed (sequential offload after the move) makes later images faster",
        variant="step 3 as printed: sequential offload",
        baseline="plain",
        metric="seconds_per_image",
        short="step 3 as printed, later pictures",
    ),
    Claim(
        text="step 4 (three convolutions) shortens the way to the first picture (article: by 1.2 s)",
        variant="step 4: wake the hardware",
        baseline="plain",
        metric="first_png",
        short="step 4, first picture",
    ),
    Claim(
        text="one dummy generation makes later images faster",
        variant="warm-up without compiling",
        baseline="plain",
        metric="seconds_per_image",
    ),
    Claim(
        text="all four steps shorten the way to the first picture (article: 14.7 to 2.9 s)",
        variant="steps 1+2+3+4",
        baseline="plain",
        metric="first_png",
        short="all four, first picture",
    ),
    Claim(
        text="all four steps make later images faster (article: 2.2 to 1.8 s)",
        variant="steps 1+2+3+4",
        baseline="plain",
        metric="seconds_per_image",
        short="all four, later pictures",
    ),
    Claim(
        text="all four steps make later images steadier (article: no jitter)",
        variant="steps 1+2+3+4",
        baseline="plain",
        metric="jitter",
    ),
]

IMPOSSIBLE = {
    "step 3 compiles pipe.unet": "ZImagePipeline has no unet, its network is the transformer; assigning the attribute "
    "compiles nothing (refused here: compile.target=unet)",
    "sequential offload and fullgraph compilation together": "the offload's Python hooks on every layer cannot be "
    "captured in one graph (refused here)",
    "the dummy generation warms the compiled model": "as printed it runs before torch.compile is called, so it warms "
    "the eager path only",
}
"""Claims that no measurement can decide, and why. Each refusal is tested in tests/config."""


def verdict(claim: Claim, rows: Mapping[str, Row]) -> str:
    """confirmed, no effect, harmful or not decided, with figures; or not measured."""
    one, other = spread_of(rows, claim.variant, claim.metric), spread_of(rows, claim.baseline, claim.metric)
    if one is None or other is None:
        return "not measured"
    figures = f"{other.median:.2f} -> {one.median:.2f} {claim.unit}{_share(one, other)}"
    return f"{judge(one, other, claim.metric)}: {figures}, n = {other.count} and {one.count}"


def judge(one: Spread, other: Spread, metric: str = "") -> str:
    """``one`` against ``other``, where less is better: beyond both spreads and 2 %, or no effect.

    A single process has no spread to show; it is taken to be as uncertain as the other contestant. Fewer than three
    processes do not decide what is within the usual differences between processes.
    """
    widths = [s.half_width for s in (one, other) if s.count > 1] or [0.0]
    noise = max(2 * sum(widths) / len(widths), LEAST_SHARE * other.median)
    difference = one.median - other.median
    if abs(difference) <= noise:
        return "no effect"
    if min(one.count, other.count) < FEW and abs(difference) <= BETWEEN_PROCESSES.get(metric, 0.0) * other.median:
        return "not decided"
    return "confirmed" if difference < 0 else "harmful"


def _share(one: Spread, other: Spread) -> str:
    return f" ({one.median / other.median - 1:+.0%})" if other.median else ""


def spread_of(rows: Mapping[str, Row], variant: str, metric: str) -> Spread | None:
    """A contestant's figures by the field's name; None if it has none."""
    get: Callable[[Row], Spread | None] = lambda row: getattr(row, metric)  # noqa: E731
    return get(rows[variant]) if variant in rows else None
