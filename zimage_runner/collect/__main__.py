"""Bring the pictures of runs together: in one folder with a table of what each shows, or on contact sheets.

    python -m zimage_runner collect RUN... into=FOLDER [name='{index:05d}_{slug}_seed_{seed}'] [overwrite=true]
                  [layout=webdataset] [format=webp] [quality=90] [starred=true] [rejected=false]
    python -m zimage_runner collect RUN... sheet=FILE.png [tile=192] [columns=8] [rows=8] [starred=true]

RUN     a run directory, a folder of runs (outputs/cats, a multirun, all shards of a set), or latest
into    hard links to the pictures (copies on another disk) under names of your own, and metadata.jsonl: file name,
        prompt, seed, parameters and metadata of each. Made again after a resume, it holds what has come since. Rows
        of pictures that other calls brought there are kept. While one call writes there, a second is refused
name    of index, slug (of the id or prompt), id (of prompts that have one), seed, run and job (the run's folder name),
        text, width, height ...
format  png, jpeg or webp for all; without it they stay as they are. quality: 1 to 100 (usually 90), for webp also
        lossless
starred true: only pictures that were starred in the gallery. rejected=false: all but those that were rejected there
layout  of into: imagefolder (usual), webdataset (00000.tar with .png, .txt and .json of each picture, and the table
        00000.parquet) or parquet (data/train-00000-of-00003.parquet, as Hugging Face has it): these two hold copies
shard_pictures, shard_mb   most pictures (10000) and megabytes (1000) in a file of webdataset or parquet
sheet   each picture with its prompt and seed below; more pages are FILE_2.png, FILE_3.png ...

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from zimage_runner.cli.resume.command_line import folder_named
from zimage_runner.collect.contact_sheet import Layout, draw_sheets
from zimage_runner.collect.folder import NAME, collect_into
from zimage_runner.collect.pictures import find_runs, marked, pictures_of
from zimage_runner.collect.shards import Bounds, collect_shards
from zimage_runner.errors import EXIT_OK, PROGRAM, UserError, called, counted
from zimage_runner.logs import command, say
from zimage_runner.outputs.config import MOST_IN_A_SHARD, Format, Output, check_quality

FIELDS = (
    "into",
    "layout",
    "shard_pictures",
    "shard_mb",
    "name",
    "format",
    "quality",
    "overwrite",
    "sheet",
    "tile",
    "columns",
    "rows",
    "starred",
    "rejected",
)
OF_SHARDS, LAYOUTS = ("shard_pictures", "shard_mb"), ("imagefolder", "webdataset", "parquet")
OF_INTO = ("name", "format", "quality", "overwrite", "layout", *OF_SHARDS)
OF_SHEET = ("tile", "columns", "rows")


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, lambda words: _collect(*_parse(words)), fields=FIELDS)


def _parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Runs, and fields by name."""
    runs, fields = [], {}
    for word in argv:
        match = re.fullmatch(r"(?s)(\w+)=(.*)", word)
        if match is None:
            runs.append(word)
        elif match[1] in FIELDS:
            fields[match[1]] = match[2]
        else:
            raise UserError(f"{word}: no such field; fields here: {', '.join(FIELDS)}")
    if not runs:
        raise UserError("no run is named: give a run directory, a folder of runs, or latest")
    if not fields.keys() & {"into", "sheet"}:
        raise UserError("nothing to do: add into=FOLDER for the pictures and their table, or sheet=FILE.png")
    for needed, others in (("into", OF_INTO), ("sheet", OF_SHEET)):
        if needed not in fields and (idle := [name for name in others if name in fields]):
            raise UserError(f"{idle[0]}={fields[idle[0]]} has no effect without {needed}=")
    return runs, fields


def _collect(runs: list[str], fields: dict[str, str]) -> int:
    overwrite = _switch(fields, "overwrite", False)
    form, bounds = _layout(fields)
    starred, rejected = _switch(fields, "starred", False), _switch(fields, "rejected", True)
    layout = Layout(**{name: _count(fields, name) for name in OF_SHEET if name in fields})
    output = _output(fields.get("format"), fields.get("quality"))
    pictures = list(pictures_of(find_runs([folder_named(run) for run in runs])))
    if not pictures:
        raise UserError(f"{' '.join(runs)}: no picture is finished there yet")
    if starred or not rejected:
        pictures = list(marked(pictures, starred=starred, rejected=rejected))
        if not pictures:
            what = "is starred" if starred else "is left: all were rejected"
            raise UserError(f"{' '.join(runs)}: no picture there {what}; {called(PROGRAM)} view marks them")
    if "into" in fields and form != LAYOUTS[0]:
        folder = Path(fields["into"]).expanduser()
        shards, number = collect_shards(folder, pictures, form, bounds, overwrite=overwrite, output=output)
        say(f"{counted(number, 'picture')} in {counted(shards, 'shard')}")
        say(str(folder), sys.stdout)
    elif "into" in fields:
        folder = Path(fields["into"]).expanduser()
        table, number = collect_into(folder, pictures, fields.get("name", NAME), overwrite=overwrite, output=output)
        say(f"{counted(number, 'picture')}, listed in {table}")
        say(str(folder), sys.stdout)
    if "sheet" in fields:
        for page in draw_sheets(Path(fields["sheet"]).expanduser(), pictures, layout):
            say(str(page), sys.stdout)
    return EXIT_OK


def _layout(fields: dict[str, str]) -> tuple[str, Bounds]:
    """``layout=`` and the bounds of its shards. Raises UserError."""
    form = fields.get("layout", LAYOUTS[0])
    if form not in LAYOUTS:
        raise UserError(f"layout={form}: write {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
    if form == LAYOUTS[0] and (idle := [name for name in OF_SHARDS if name in fields]):
        raise UserError(f"{idle[0]}={fields[idle[0]]} has no effect without layout=webdataset or layout=parquet")
    if form != LAYOUTS[0] and "name" in fields:
        raise UserError(f"name={fields['name']} has no effect on layout={form}, whose keys are numbers: leave it out")
    pictures = fields.get("shard_pictures", str(MOST_IN_A_SHARD))
    if not re.fullmatch(r"[0-9]{1,5}", pictures) or not 1 <= int(pictures) <= MOST_IN_A_SHARD:
        raise UserError(f"shard_pictures={pictures}: write a whole number from 1 to {MOST_IN_A_SHARD}")
    megabytes = fields.get("shard_mb", "1000")
    if not re.fullmatch(r"[0-9]{1,6}", megabytes) or int(megabytes) < 1:
        raise UserError(f"shard_mb={megabytes}: write a whole number from 1 to 999999")
    return form, Bounds(pictures=int(pictures), megabytes=int(megabytes))


def _output(name: str | None, quality: str | None) -> Output | None:
    """``format=`` and ``quality=``; None where pictures are to stay as they are. Raises UserError."""
    if name is None and quality is None:
        return None
    formats = {format.name: format for format in Format} | {"jpg": Format.jpeg}
    format = formats.get((name or "png").lower())
    if format is None:
        raise UserError(f"format={name}: write png, jpeg or webp")
    value = int(quality) if quality is not None and re.fullmatch("[0-9]{1,4}", quality) else quality
    check_quality("quality", format, value)
    return Output(format=format, quality=value)


def _switch(fields: dict[str, str], name: str, default: bool) -> bool:
    value = fields.get(name, str(default)).lower()
    if value not in ("true", "false"):
        raise UserError(f"{name}={fields[name]}: write true or false")
    return value == "true"


def _count(fields: dict[str, str], name: str) -> int:
    value = fields[name]
    if not re.fullmatch(r"[0-9]{1,4}", value) or int(value) < 1:
        raise UserError(f"{name}={value}: write a whole number from 1 to 9999")
    return int(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
