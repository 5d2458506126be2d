"""How far apart the pictures of two runs are: the gate for arithmetic that draws other bits.

    python -m zimage_runner compare A B [floor=C] [worst=8] [into=FOLDER] [-- OPTIONS]

A, B    run directories, or options in quotes ("engine.precision=fp8"): those are drawn, each with the OPTIONS after --
floor   a third way, such as "engine.attention=cudnn", or its run: A against it is the noise floor, what changes without
        anybody's having meant to. Figures of B say little without it
worst   pairs on the sheet, those with the largest FLIP first
into    where comparison.json and worst.png go, and runs that are drawn (default: outputs/compare/A--B)

PSNR in dB (higher is nearer), SSIM (1 is equal) and FLIP (0 is equal), mean and worst of all pictures that both runs
have; LPIPS, whose network would have to be fetched, is left out. Where B is in fp8 or int8 and A is not, the figures
are kept in the manifest of the copy that B was drawn with: runs with that copy name them in their summary.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from zimage_runner.collect.likeness import Likeness, likeness
from zimage_runner.collect.pictures import Picture, find_runs, pictures_of
from zimage_runner.collect.sheet import Page, draw
from zimage_runner.engines.device import has_no_gpu
from zimage_runner.engines.precision import likeness_key, likeness_numerics
from zimage_runner.errors import EXIT_OK, UserError, counted
from zimage_runner.logs import command, say
from zimage_runner.outputs import atomic
from zimage_runner.weights.prepared import figures

FIELDS = ("floor", "worst", "into")
TILE = 512
UP = {"psnr": True, "ssim": True, "flip": False}
"""Whether more is nearer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same item drawn in two ways."""

    first: Picture
    second: Picture
    likeness: Likeness


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, lambda words: _compare(*_parse(words)), fields=FIELDS)


def _parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """The two ways, fields by name, and the options of what is drawn."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    ways, given = [], {}
    for word in argv[:cut]:
        match = re.fullmatch(r"(?s)(\w+)=(.*)", word)
        if match is not None and match[1] in FIELDS:
            given[match[1]] = match[2]
        else:
            ways.append(word)
    if len(ways) != 2:
        named = counted(len(ways), "way is", "ways are")
        raise UserError(f"{named} named: give two, each a run directory or options in quotes")
    options = list(argv[cut + 1 :])
    drawn = [way for way in [*ways, given.get("floor", ".")] if not Path(way).expanduser().is_dir()]
    if options and not drawn:
        raise UserError(f"{shlex.join(options)} has no effect: both runs are there already")
    for way in drawn:
        if "=" not in way:
            raise UserError(f"{way} is no run directory and no option: name a run, or options such as {DRAWN}")
        try:
            shlex.split(way)
        except ValueError as error:
            raise UserError(f"{way}: {error}: close what is quoted within the options") from None
    return ways, given, options


DRAWN = '"engine.precision=fp8"'


def _compare(ways: list[str], given: dict[str, str], options: list[str]) -> int:
    worst = given.get("worst", "8")
    if not worst.isdecimal() or worst == "0":
        raise UserError(f"worst={worst}: give a number of pairs")
    names = [re.sub(r"[^\w.=-]+", "_", Path(way).name) for way in ways]
    into = Path(given.get("into", f"outputs/compare/{'--'.join(names)}")).expanduser()
    third = given.get("floor")
    finished = {way: _finished(way) for way in [*ways, third] if way is not None and Path(way).expanduser().is_dir()}
    for way in [way for way in [*ways, third] if way is not None and way not in finished][1:]:
        _check(way, into, options)  # before hours of drawing: the first one is checked as it begins
    if into.exists() and not into.is_dir():
        raise UserError(f"into={into} is a file: name a folder")
    runs = [finished.get(way) or _drawn(way, into, options) for way in ways]
    pairs = compare_runs(*runs)
    report: dict[str, Any] = {"runs": list(map(str, runs)), "pictures": len(pairs), "likeness": summarised(pairs)}
    if third is not None:
        floor_run = finished.get(third) or _drawn(third, into, options)
        floor = compare_runs(runs[0], floor_run)
        report |= {"floor_run": str(floor_run), "floor": summarised(floor)}
    psnrs = [
        pair.likeness.psnr if math.isfinite(pair.likeness.psnr) else None for pair in pairs
    ]  # JSON has no infinity
    report["pairs"] = [
        {"item": pair.first.item, **asdict(pair.likeness), "psnr": psnr} for pair, psnr in zip(pairs, psnrs)
    ]
    into.mkdir(parents=True, exist_ok=True)
    atomic.replace_file(into / "comparison.json", (json.dumps(report, indent=1, default=str) + "\n").encode())
    sheet = io.BytesIO()
    _sheet(pairs[: int(worst)], names).save(sheet, "PNG")
    atomic.replace_file(into / "worst.png", sheet.getvalue())
    say(table(report), sys.stdout)
    say(str(into), sys.stdout)
    if (kept := _keep(runs[1], pairs[0], report)) is not None:
        say(f"kept for the summaries of later runs: {kept}", sys.stdout)
    return EXIT_OK


def _finished(folder: str) -> Path:
    """The run in a folder."""
    runs = find_runs([Path(folder).expanduser()])
    if len(runs) > 1:
        raise UserError(f"{folder} holds {len(runs)} runs: name one of them")
    return runs[0]


def _command(way: str, into: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "zimage_runner", *options, *shlex.split(way), f"output.root={into}"]


def _check(way: str, into: Path, options: list[str]) -> None:
    """Raise UserError for options that cannot be drawn."""
    # A plan is for any machine. Without a GPU here it is made for the CPU, unless others draw or the options say more.
    words = [*options, *shlex.split(way)]
    on_cpu = has_no_gpu() and not _is_by_ray(_command(way, into, options))
    if on_cpu and "engine.device=cuda" in words:
        raise UserError(f"{way} cannot be drawn, and so nothing was: engine.device=cuda but no CUDA GPU is visible")
    command = _command(way, into, ["engine.device=cpu", *options] if on_cpu else options)
    done = subprocess.run([*command, "dry_run=true"], capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        print(done.stderr, end="", file=sys.stderr)
        raise UserError(f"{way} cannot be drawn (exit code {done.returncode}), and so nothing was: see above")


def _is_by_ray(command: list[str]) -> bool:
    """Whether Ray's workers draw, which an experiment can say as well as a word."""
    listed = subprocess.run([*command, "--info=defaults"], capture_output=True, text=True, encoding="utf-8")
    return "executor/ray" in listed.stdout


def _drawn(way: str, into: Path, options: list[str]) -> Path:
    """The run that options mean, drawn now."""
    done = subprocess.run(_command(way, into, options), stdout=subprocess.PIPE, text=True, encoding="utf-8")
    lines = done.stdout.split("\n") if done.stdout else []
    found = [line for line in lines if line.strip() and Path(line.strip()).is_dir()]
    if done.returncode != 0 or not found:
        raise UserError(f"{way} was not drawn (exit code {done.returncode}): see above")
    return Path(found[-1].strip())


def compare_runs(first: Path, second: Path) -> list[Pair]:
    """Every item that both runs have finished, the worst pair first. Raises UserError where they drew other things."""
    others = {picture.item: picture for picture in pictures_of([second])}
    pairs = []
    for picture in pictures_of([first]):
        other = others.get(picture.item)
        if other is None:
            continue
        mine, theirs = picture.record(), other.record()
        for name in ("prompt", "seed"):
            if mine.get(name) != theirs.get(name):
                both = f"{mine.get(name)!r} in {first}, {theirs.get(name)!r} in {second}"
                raise UserError(f"{picture.item}: its {name} is {both}: compare runs of the same prompts and seeds")
        pairs.append(Pair(picture, other, _likeness(picture, other)))
    if not pairs:
        raise UserError(f"{first} and {second} have no picture in common: compare runs of the same prompts and seeds")
    return sorted(pairs, key=lambda pair: -pair.likeness.flip)


def _likeness(first: Picture, second: Picture) -> Likeness:
    import numpy as np
    from PIL import Image

    pixels = []
    for picture in (first, second):
        with picture.image.open() as stream, Image.open(stream) as image:
            pixels.append(np.array(image.convert("RGB")))
    if pixels[0].shape != pixels[1].shape:
        sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in pixels)
        raise UserError(f"{first.item}: the pictures are {sizes}: compare runs of one size")
    return likeness(*pixels)


def summarised(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Mean and worst of each measure. Equal pictures, whose PSNR is infinite, count as 100 dB in the mean."""
    found = {}
    for one in fields(Likeness):
        values = [min(getattr(pair.likeness, one.name), 100.0) for pair in pairs]
        found[one.name] = {"mean": statistics.fmean(values), "worst": min(values) if UP[one.name] else max(values)}
    return found


def table(report: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    rows = [("B against A", report["likeness"])]
    rows += [("noise floor", report["floor"])] if "floor" in report else []
    lines = [f"{report['pictures']:,} pictures{'':<14}PSNR mean, worst    SSIM mean, worst    FLIP mean, worst"]
    for name, found in rows:
        cells = [f"{found[m]['mean']:9.4g} {found[m]['worst']:9.4g}" for m in ("psnr", "ssim", "flip")]
        lines.append(f"  {name:<22}{cells[0]} {cells[1]} {cells[2]}")
    return "\n".join(lines)


def _sheet(pairs: Sequence[Pair], names: Sequence[str]) -> Any:
    rows = []
    for pair in pairs:
        near = pair.likeness
        rows.append(f"{pair.first.item}: PSNR {near.psnr:.1f}, SSIM {near.ssim:.3f}, FLIP {near.flip:.3f}")
    page = Page(title="The pairs that differ most", name="worst", rows=rows, columns=list(names))
    for row, pair in enumerate(pairs):
        page.pictures[row, 0], page.pictures[row, 1] = pair.first.image, pair.second.image
    return draw(page, TILE)


def _keep(run: Path, pair: Pair, report: Mapping[str, Any]) -> Path | None:
    """Keep the figures of a precision, for the summaries of runs in it. Return where they are, if they are."""
    mine, theirs = pair.first.record(), pair.second.record()
    if not {"model", "numerics"} <= mine.keys() & theirs.keys():
        return None
    key = likeness_key(theirs["model"].get("digest"), theirs["numerics"])
    if key is None or likeness_key(mine["model"].get("digest"), mine["numerics"]) is not None:
        return None
    if mine["model"].get("digest") != theirs["model"].get("digest"):
        return None
    kept = {name: report[name] for name in ("pictures", "likeness", "floor") if name in report}
    kept["numerics"] = likeness_numerics(theirs["numerics"])
    if math.isnan(kept["likeness"]["psnr"]["mean"]):
        return None
    return figures.keep(run, theirs["model"]["digest"], key, kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
