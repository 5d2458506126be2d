"""How far runs are: state, counts, pace and failures.

    python -m zimage_runner status [RUN...] [json=true]

RUN     a run directory, a multirun, a folder of runs, or latest (default: the run or multirun below outputs/ that was
        written to last)
json    true: one JSON object, {"runs": [...], "multiruns": [...], "sets": [...]}, for programs

A run is running, finished, interrupted (there is more to draw), failures (all was tried, some in vain) or empty.
Runs with the same settings but for prompts.shard are one set; it is interrupted while a shard is missing.
Nothing is changed, and a run that draws is not disturbed. Exit codes: 0 told, 2 bad input.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zimage_runner.errors import EXIT_OK, PROGRAM, UserError, called, one_line
from zimage_runner.logs import command, duration, say
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.ledger import RECORDS
from zimage_runner.outputs.lock import LOCK_NAME
from zimage_runner.view.folder import Folder
from zimage_runner.view.index import Index
from zimage_runner.view.rows import FAILED
from zimage_runner.view.runs import PROMPTS, below, find_runs, named
from zimage_runner.view.shards import Shard, sets_of, shard_of
from zimage_runner.view.watch import Watcher

OUTPUTS = "outputs"
TOLD = ("state", "planned", "done", "failed", "left_seconds", "seconds")
"""What the gallery's description of a run or multirun says that is told here too."""
FAILURES_SHOWN = 5
LONGEST_ERROR = 200


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, _tell, bare=True)


def _tell(argv: Sequence[str]) -> int:
    folders, as_json = _parse(argv)
    found = status_of(folders or [newest(OUTPUTS)])
    if as_json:
        say(compact_json(found).replace("\x7f", "\\u007f"), sys.stdout)
    else:
        say("\n".join(_lines(**found)), sys.stdout)
    return EXIT_OK


def _parse(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Folders, and whether JSON is wanted. Raises UserError."""
    folders, as_json = [], False
    for word in argv:
        match = re.fullmatch(r"(?s)([a-z_]+)=(.*)", word)
        if match is None or os.path.exists(word):
            folders.append(named(word))
        elif match[1] != "json":
            raise UserError(f"{word}: no such field; the only one here is json")
        elif match[2] not in ("true", "false"):
            raise UserError(f"{word}: write json=true or json=false")
        else:
            as_json = match[2] == "true"
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is no folder: name a run directory, a multirun or a folder of runs")
    return folders, as_json


def newest(root: str) -> str:
    """The run below ``root`` that was written to last; for a job of a multirun, the multirun. Raises UserError."""
    runs = [(_changed(os.path.join(root, run.path)), run) for run in find_runs(root)]
    if not runs:
        raise UserError(f"there is no run below {root}: name a run directory, or the folder that output.root says")
    run = max(runs, key=lambda found: found[0])[1]
    return os.path.join(root, run.path if run.sweep is None else run.sweep).rstrip("/")


def _changed(run: str) -> float:
    """When a run was last written to, in seconds since 1970."""
    times = [0.0]
    for name in (RECORDS, LOCK_NAME, PROMPTS):
        try:
            times.append(os.lstat(os.path.join(run, name)).st_mtime)
        except OSError:
            continue
    return max(times)


def status_of(folders: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What is known of each run in these folders, of each multirun and of each set of shards.

    Raises UserError for a folder without runs, OSError.
    """
    runs, multiruns, shards = [], [], []
    for folder in folders:
        for found, kind in zip(_status_of(folder), (runs, multiruns, shards)):
            kind += found
    sets = []
    for seen in sets_of(shards):
        told = {"runs": seen["runs"], "of": seen["of"], "missing": seen["missing"]}
        sets.append(told | {k: v for k, v in _told("", seen).items() if k != "path"})
    return {"runs": runs, "multiruns": multiruns, "sets": sets}


def _status_of(root: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Shard]]:
    with Folder(root) as folder:
        index = Index(folder, None)
        try:
            watcher = Watcher(root, folder, index)  # never started: one look is enough
            watcher.look()
            seen = watcher.overview()
            failures: dict[int, list[dict[str, Any]]] = {}
            with index.reading() as db:
                rows = db.execute(f"SELECT prompt >> 32, item, error FROM pictures WHERE status={FAILED} ORDER BY id")
                for number, item, error in rows:
                    failures.setdefault(number, []).append({"item": item, "error": error})
            shards = [shard_of(folder, run, _path(root, run["path"])) for run in seen["runs"]]
        finally:
            index.close()
    if not seen["runs"]:
        raise UserError(f"{root}: there is no run in it: name a run directory, a multirun or a folder of runs")
    runs = []
    for run in seen["runs"]:
        multirun = None if run["sweep"] is None else _path(root, run["sweep"])
        told = _told(root, run) | {"loading": run["loading"], "stopped": run["stopped"] or None, "multirun": multirun}
        runs.append(told | {"parameters": run["parameters"], "failures": failures.get(run["id"], [])})
    multiruns = [_told(root, sweep) | {"varying": sweep["varying"]} for sweep in seen["sweeps"]]
    return runs, multiruns, [shard for shard in shards if shard is not None]


def _told(root: str, seen: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": _path(root, seen["path"]), **{k: seen[k] for k in TOLD}, "pictures_per_second": seen["speed"]}


def _path(root: str, name: str) -> str:
    return below(root.rstrip("/") or "/", name) if name else root


def _lines(
    runs: Sequence[Mapping[str, Any]], multiruns: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """For people: a line for each multirun, set of shards and run, its failures below it."""
    paths = {run["path"]: run for run in runs}
    in_sets = {path for found in sets for path in found["runs"].values()}
    sweeps = {sweep["path"]: sweep for sweep in multiruns}
    told = set()
    for run in runs:
        sweep = sweeps.get(run["multirun"])
        if run["path"] in in_sets:
            continue
        if sweep is None:
            yield f"{run['path']}: {_state(run)}"
            yield from _below(run, "  ", resumable=True)
            continue
        if sweep["path"] not in told:
            told.add(sweep["path"])
            yield f"{sweep['path']}: {_state(sweep)}"
        values = [f"{name}={run['parameters'].get(name)}" for name in sweep["varying"]]
        name = os.path.basename(run["path"])
        yield f"  {one_line(' '.join([name, *values]), LONGEST_ERROR)}: {_state(run)}"
        yield from _below(run, "    ", resumable=False)
    for found in sets:
        yield f"set of {found['of']:,} shards: {_state(found)}"
        for number, path in found["runs"].items():
            yield f"  {number}/{found['of']} {path}: {_state(paths[path])}"
            yield from _below(paths[path], "    ", resumable=True)
        if missing := [f"{number}/{found['of']}" for number in found["missing"][: FAILURES_SHOWN + 1]]:
            names = ", ".join(missing[:FAILURES_SHOWN])
            yield f"  not among these runs: {names}{' ...' if len(missing) > FAILURES_SHOWN else ''}"


def _below(run: Mapping[str, Any], indent: str, *, resumable: bool) -> Iterator[str]:
    """The lines below a run's own."""
    for failure in run["failures"][:FAILURES_SHOWN]:
        yield f"{indent}{failure['item']}: {one_line(failure['error'] or 'failed', LONGEST_ERROR)}"
    if (more := len(run["failures"]) - FAILURES_SHOWN) > 0:
        yield f"{indent}and {more:,} more (json=true lists all)"
    if resumable and run["state"] in ("interrupted", "failures"):
        yield f"{indent}to draw the rest: {called(PROGRAM)} resume={shlex.quote(run['path'])}"


def _state(seen: Mapping[str, Any]) -> str:
    """State, counts and pace of a run or multirun, such as ``running, 3 of 8 pictures, 2.5 s a picture, 12 s left``."""
    done, planned = seen["done"], seen["planned"]
    count = done if planned is None else planned
    of = "" if planned is None else f" of {planned:,}"
    parts = [
        "loading" if seen.get("loading") else "some failed" if seen["state"] == "failures" else seen["state"],
        f"{done:,}{of} picture{'' if count == 1 else 's'}",
    ]
    if seen["failed"]:
        parts.append(f"{seen['failed']:,} failed")
    if speed := seen["pictures_per_second"]:
        parts.append(f"{speed:.3g} pictures a second" if speed >= 1 else f"{1 / speed:.3g} s a picture")
    if seen["left_seconds"]:
        parts.append(f"{duration(seen['left_seconds'])} left")
    elif seen["seconds"]:
        parts.append(f"took {duration(seen['seconds'])}")
    stopped = f" ({one_line(seen['stopped'], LONGEST_ERROR)})" if seen.get("stopped") else ""
    return ", ".join(parts) + stopped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
