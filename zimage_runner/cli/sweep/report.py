"""What a multirun leaves in its own directory: one table of all jobs, and a grid picture of what was swept."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zimage_runner.cli.hydra_patches import parse_override, split_sweep
from zimage_runner.cli.quoting import hydra_quote
from zimage_runner.cli.resume.saved import SETTINGS
from zimage_runner.cli.resume.sweep import is_sweep
from zimage_runner.collect.overrides import inert, overrides_by_field, varying_fields
from zimage_runner.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, EXIT_OK
from zimage_runner.logs import say
from zimage_runner.outputs.atomic import directory, write_file
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.config import wants_report
from zimage_runner.outputs.parsed import from_json, from_yaml, mapping
from zimage_runner.outputs.run_dir import folder_there

log = logging.getLogger(__name__)

EXIT_OF_STATUS = {
    "complete": EXIT_OK,
    "failures": EXIT_ITEMS_FAILED,
    "not run": EXIT_ITEMS_FAILED,
    "stopped": EXIT_INTERRUPTED,
}
exit_codes: list[int] = []
"""Of the last multirun's jobs, the more exact of those that were not run first. Jobs of launchers that use other
processes can tell it no other way."""

begun: list[tuple[Path, Path]] = []
"""Directory of the run or multirun that began here, unless a multirun is resumed, and the folder that was there before:
itself or one above it."""

REPORT = "report.html"
COLUMNS = ("status", "done", "failed", "seconds_per_image", "directory")


def known_code(code: int | Future[int]) -> int:
    """Return an exit code; of a job that ended late, the one that it ended with. Called when the launcher has ended."""
    return code.result(timeout=0) if isinstance(code, Future) else code


@dataclass(kw_only=True, slots=True)
class JobResult:
    """What became of one job of a multirun, as far as it left traces."""

    number: int
    directory: Path
    overrides: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    """None when it ran in another process."""

    @property
    def status(self) -> str:
        """complete, failures or stopped as in summary.json; else refused, failed, or not run as far as is known."""
        if self.summary.get("status"):
            return str(self.summary["status"])
        return {None: "not run", EXIT_BAD_INPUT: "refused"}.get(self.exit_code, "failed")

    @property
    def code(self) -> int:
        """The exit code of the job, or what its files say of it."""
        return EXIT_OF_STATUS.get(self.status, EXIT_ITEMS_FAILED) if self.exit_code is None else self.exit_code

    def cells(self) -> dict[str, Any]:
        items, images = mapping(self.summary.get("items")), mapping(self.summary.get("images"))
        seconds = images.get("mean_seconds", images.get("first_seconds"))
        return {
            "status": self.status,
            "done": items.get("ok", 0) + items.get("done_before", 0) + items.get("linked", 0),
            "failed": items.get("failed", 0),
            "seconds_per_image": "" if seconds is None else round(seconds, 4),
            "directory": self.directory.name,
        }


class SweepReport(Callback):
    """Hydra calls it around jobs and multiruns, with whichever launcher."""

    def __init__(self, grid: bool = True, tile: int = 256) -> None:
        """``grid``: draw it. ``tile``: largest side of its pictures in pixels."""
        self._grid = grid
        self._tile = tile
        self._exit_codes: dict[int, int | Future[int]] = {}
        self._overrides: dict[int, list[str]] = {}
        self._directories: dict[int, Path] = {}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra makes the run's directory next."""
        with contextlib.suppress(OmegaConfBaseException):  # as it tells then
            _note_begun(str(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep all jobs in one directory: what a job varies (its name, its experiment) would else lead it elsewhere."""
        directory = str(config.hydra.sweep.dir)
        if not is_sweep(Path(directory)):
            _note_begun(directory)
        # Not resolved: ${hydra.job.num} is not known yet.
        given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        others = [text for text in given if not text.lstrip("+").startswith("hydra.sweep.dir=")]
        config.hydra.overrides.hydra = [*others, f"hydra.sweep.dir={hydra_quote(directory)}"]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Only jobs of this process are heard of; the others are read from disk."""
        number = config.hydra.job.get("num")
        if isinstance(number, int):
            code = job_return._return_value
            self._exit_codes[number] = code if isinstance(code, int | Future) else EXIT_ITEMS_FAILED
            self._overrides[number] = list(config.hydra.overrides.task)
            self._directories[number] = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write summary.csv, summary.md and the grid into the sweep's directory."""
        root = Path(str(config.hydra.sweep.dir))
        jobs = self._jobs(root, expected_jobs(config))
        exit_codes.extend(job.code for job in jobs)
        if config.dry_run or all(job.summary == {} for job in jobs):
            return
        fields = varying_fields(job.overrides for job in jobs)
        with directory(root) as folder:
            write_file(folder, "summary.csv", csv_table(jobs, fields).encode())
            write_file(folder, "summary.md", markdown_table(jobs, fields).encode())
        say(f"table: {root / 'summary.md'} (and summary.csv)")
        if self._grid and fields:
            from zimage_runner.collect.grid import write_grids

            pages = write_grids(root, jobs, fields, tile=self._tile)
            if pages:
                say(f"grid: {pages[0]}" if len(pages) == 1 else f"grid: {len(pages)} pages in {pages[0].parent}")
        if _leaves_report(config.output.report, root, jobs):
            from zimage_runner.view.report import leave_report

            if leave_report(root):
                say(f"report: {root / REPORT}")
        say(str(root.absolute()), sys.stdout)

    def _jobs(self, root: Path, expected: list[dict[str, str]]) -> list[JobResult]:
        own = {number: path for number, path in self._directories.items() if path.is_dir()}
        others = {int(path.name): path for path in root.iterdir() if _is_job(path)}
        found = {number: read_job(path, number) for number, path in (others | own).items()}
        for number, code in self._exit_codes.items():
            job = found.setdefault(number, JobResult(number=number, directory=self._directories[number]))
            job.exit_code = known_code(code)
            job.overrides = job.overrides or split_overrides(self._overrides[number])
        for number, overrides in enumerate(expected):
            job = found.setdefault(number, JobResult(number=number, directory=root / str(number)))
            job.overrides = job.overrides or overrides
        return [found[number] for number in sorted(found)]


def expected_jobs(config: DictConfig) -> list[dict[str, str]]:
    """Overrides of each job that Hydra's own sweeper makes, in its order; other sweepers decide as they go."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return []
    return [split_overrides(job) for job in split_sweep(config.hydra.overrides.task)]


def _leaves_report(wanted: bool | None, root: Path, jobs: list[JobResult]) -> bool:
    """Whether the multirun shall have a report and some job has ended since the last one was written."""
    pictures = sum(job.summary.get("items", {}).get("planned", 0) for job in jobs)
    if not wants_report(wanted, pictures) or any(job.status == "stopped" for job in jobs):
        return False
    written = _changed(root / REPORT)
    return any(_changed(job.directory / "summary.json") > written for job in jobs)


def _changed(file: Path) -> int:
    """When a file was last written; 0 where there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _note_begun(directory: str) -> None:
    begun.append((Path(os.path.realpath(directory)), folder_there(directory)))


def _is_job(path: Path) -> bool:
    return path.name.isdigit() and not path.is_symlink() and os.path.lexists(path / SETTINGS)


def read_job(path: Path, number: int | None = None) -> JobResult:
    """A job from its directory; what is missing or unreadable stays empty."""
    try:
        overrides = split_overrides(from_yaml(Inside(path, ".hydra/overrides.yaml").read_bytes()))
    except (OSError, ValueError, AttributeError, TypeError):
        overrides = {}
    try:
        summary = mapping(from_json(Inside(path, "summary.json").read_bytes()))
    except (OSError, ValueError):
        summary = {}
    number = int(path.name) if number is None else number
    return JobResult(number=number, directory=path, overrides=overrides, summary=summary)


def split_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """field -> value of ``field=value`` texts, without the quotes and backslashes that the command line needs."""
    return overrides_by_field(overrides, _plain)


def _plain(override: str) -> str:
    """The value as a person would write it."""
    value = override.partition("=")[2]
    if not re.search(r"[\"'\\]", value) or value.startswith(("[", "{")):
        return value
    try:
        read = parse_override(override).value()
    except HydraException:
        return value.strip("\"'")
    return read.replace("\\${", "${") if isinstance(read, str) else value


def csv_table(jobs: list[JobResult], fields: list[str]) -> str:
    """A row a job. Text that a spreadsheet would run as a formula is kept from it by an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["job", *map(inert, fields), *COLUMNS])
    for job in jobs:
        cells = job.cells()
        writer.writerow([job.number, *(inert(job.overrides.get(f, "")) for f in fields), *(cells[c] for c in COLUMNS)])
    return out.getvalue()


def markdown_table(jobs: list[JobResult], fields: list[str]) -> str:
    """The same as a Markdown table."""
    header = ["job", *fields, *COLUMNS]
    lines = [_markdown_row(header), _markdown_row(["---"] * len(header))]
    for job in jobs:
        cells = job.cells()
        lines.append(
            _markdown_row([job.number, *(job.overrides.get(f, "") for f in fields), *(cells[c] for c in COLUMNS)])
        )
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[Any]) -> str:
    return "| " + " | ".join(_markdown_text(str(cell)) for cell in cells) + " |"


def _markdown_text(text: str) -> str:
    clean = "".join(c if c.isprintable() else " " for c in text)
    for sign in "\\|`<*[":
        clean = clean.replace(sign, "\\" + sign)
    return clean
