"""The end of a run in the words of the article that the project began from: its figures beside this run's."""

from __future__ import annotations

from typing import Any

ARTICLE = {
    "first load": "14.7 s -> 2.9 s",
    "one image": "2.2 s -> 1.8 s",
    "peak GPU memory": "31.2 GB",
    "later images": "1.8 s each, no extra delay",
}
"""What the article reports for an RTX 4090D, before -> after its four steps."""


def article_table(summary: dict[str, Any]) -> str:
    """The article's four figures, its values and this run's, as a text table."""
    here = _this_run(summary)
    width = max(map(len, ARTICLE))
    column = max(map(len, ARTICLE.values()))
    device = summary["session"].get("device_name", "")
    lines = [f"  {'':<{width}}  {'the article, RTX 4090D':<{column}}  this run, {device}"]
    lines += [f"  {name:<{width}}  {value:<{column}}  {here[name]}" for name, value in ARTICLE.items()]
    return "\n".join(lines)


def _this_run(summary: dict[str, Any]) -> dict[str, str]:
    phases, images = summary["phases"], summary["images"]
    gpu = summary["session"].get("gpu_memory") or {}
    warm_up = phases.get("warm_up", 0.0)
    return {
        "first load": f"{phases['load']:.1f} s" + (f", then {warm_up:.1f} s of warm-up" if warm_up >= 0.05 else ""),
        "one image": f"{images['first_seconds']:.2f} s, the first" if images else "none drawn",
        "peak GPU memory": f"{gpu['peak_reserved_gb']:.1f} GB" if gpu else "no GPU",
        "later images": _later(images),
    }


def _later(images: dict[str, Any]) -> str:
    if "mean_seconds" not in images:
        return "one image only: give more prompts or seeds"
    delay = images["p95_seconds"] - images["median_seconds"]
    return f"{images['mean_seconds']:.2f} s each, the slowest 5 % {delay:.2f} s more than the median"
