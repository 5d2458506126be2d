"""Pictures that need not be drawn because they exist: in an earlier run, or under another prompt of this one."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.config import Fsync, Shards
from zimage_runner.outputs.finished import Finished
from zimage_runner.outputs.item_files import Filed, ItemFiles, copy_to
from zimage_runner.outputs.json_text import readable_json
from zimage_runner.outputs.ledger import RECORDS, Ledger, record_head
from zimage_runner.outputs.parsed import from_json
from zimage_runner.outputs.place import RECORD
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.survey import Pictures
from zimage_runner.plan import Fingerprints, Plan, WorkItem
from zimage_runner.runner.spec import RunSpec

if TYPE_CHECKING:
    from zimage_runner.outputs.shard_files import ShardFiles

RUNS_COMPARED, ITEMS_COMPARED, LARGEST_LEDGER = 3, 1000, 4_000_000
"""How far a new run looks for its own pictures in earlier ones, in order to tell of them: it must cost nothing."""


class Reuse:
    """The reusing of one run: before anything is drawn from earlier runs, after it among its own prompts."""

    def __init__(
        self, spec: RunSpec, run_dir: RunDirectory, ledger: Ledger, fingerprint: Fingerprints, report: dict[str, Any]
    ) -> None:
        self._spec = spec
        self._run_dir = run_dir
        self._ledger = ledger
        self._fingerprint = fingerprint
        self._report = report
        self._twins = twins(spec.plan)
        self._files: ShardFiles | None = None

    def put_into(self, files: ItemFiles) -> None:
        """Add pictures to the shards of the run, where it has some: by what writes its other pictures."""
        if isinstance(self._spec.config.output, Shards):
            from zimage_runner.outputs.shard_files import ShardFiles

            assert isinstance(files, ShardFiles)
            self._files = files

    def waits(self, item: WorkItem) -> bool:
        """True for an item that another item's picture will serve."""
        return bool(self._twins) and item.item_dir in self._twins

    def from_earlier_runs(self, todo: Iterable[WorkItem]) -> list[str]:
        """Link what ``skip_existing`` has of these items; their directories."""
        pattern = self._spec.config.skip_existing
        if pattern is None:
            return []
        wanted: dict[str, WorkItem] = {}
        for item in todo:
            wanted.setdefault(self._fingerprint(item), item)  # its twins are served by it
        found = earlier_pictures(pattern, set(wanted), self._spec.config.output.image_name, but=self._run_dir.path)
        for fingerprint, existing in found.items():
            self._adopt(wanted[fingerprint], fingerprint, existing)
        return [wanted[fingerprint].item_dir for fingerprint in found]

    def among_own(self, settled: Callable[[WorkItem], bool]) -> list[str]:
        """Link the pictures of items that waited for another item, where that one is done; their directories."""
        linked = []
        for item in self._spec.plan.items:
            first = self._twins.get(item.item_dir) if self._twins else None
            entry = self._ledger.entries.get(first) if first is not None else None
            if first is None or entry is None or not entry.ok or settled(item):
                continue
            self._adopt(item, entry.fingerprint, Finished(self._run_dir.path, first, entry))
            linked.append(item.item_dir)
        return linked

    def _adopt(self, item: WorkItem, fingerprint: str, existing: Finished) -> None:
        sync = self._spec.config.output.fsync is Fsync.item
        recipe = self._spec.recipe(item, self._report)
        output_file, files = self._spec.output_file, self._files
        adopt(
            self._run_dir, self._ledger, item, fingerprint, existing, recipe,
            output_file=output_file, files=files, sync=sync,
        )  # fmt: skip


def earlier_pictures(pattern: str, wanted: set[str], image: str, *, but: Path) -> dict[str, Finished]:
    """Fingerprint -> picture, of the runs that ``skip_existing`` names (``but`` is this run itself).

    Pictures in another format (``image``: the file name of this run's) are drawn anew. Raises UserError if the pattern
    names no run.
    """
    found: dict[str, Finished] = {}
    for run in _runs_of(pattern, but):
        entries = Ledger.load(run / RECORDS).entries
        with atomic.directory(run) as dir_fd:
            pictures = Pictures(dir_fd)
            for item, entry in entries.items():
                if (
                    not entry.ok
                    or entry.image != image
                    or entry.fingerprint not in wanted
                    or entry.fingerprint in found
                ):
                    continue
                # Read whole: linking a damaged picture would spread it.
                if pictures.damage(item, entry, verify=True) is None:
                    found[entry.fingerprint] = Finished(run, item, entry)
    return found


def drawn_before(spec: RunSpec, todo: Iterable[WorkItem]) -> set[str]:
    """Directories of the items that ``skip_existing`` would serve, if they were drawn as the runs that it names were.

    No model is loaded for it, so each run's own numerics stand for this machine's. Raises UserError as
    ``earlier_pictures``.
    """
    pattern = spec.config.skip_existing
    if pattern is None:
        return set()
    items, found = list(todo), set()
    for run in _runs_of(pattern):
        numerics = _numerics(run)
        if numerics is None:
            continue
        entries = Ledger.load(run / RECORDS).entries
        image = spec.config.output.image_name
        there = {entry.fingerprint for entry in entries.values() if entry.ok and entry.image == image}
        fingerprint = Fingerprints(spec.checkpoint.digest, numerics)
        found.update(item.item_dir for item in items if fingerprint(item) in there)
    return found


def same_elsewhere(
    directory: Path, items: Sequence[WorkItem], fingerprint: Callable[[WorkItem], str]
) -> tuple[int, Path] | None:
    """How many of ``items`` one of the last runs beside ``directory`` has already, and which run; None without any."""
    beside = [path for path in directory.parent.glob(f"*/{RECORDS}") if path.parent != directory]
    newest = sorted(beside, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:RUNS_COMPARED]
    wanted = {fingerprint(item) for item in items[:ITEMS_COMPARED]}
    for path in newest:
        if path.stat().st_size > LARGEST_LEDGER:
            continue
        entries = Ledger.load(path).entries.values()
        if found := wanted & {entry.fingerprint for entry in entries if entry.ok}:
            return len(found), path.parent
    return None


def _numerics(run: Path) -> dict[str, Any] | None:
    """How a run computed, as its summary says; None where it has none."""
    try:
        numerics = from_json(Inside(run, "summary.json").read_bytes())["session"]["numerics"]
        return numerics if isinstance(numerics, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs_of(pattern: str, but: Path | None = None) -> list[Path]:
    """The runs that ``skip_existing`` names. Raises UserError if there are none."""
    runs = [run for match in sorted(_matches(pattern)) for run in sorted(_runs(match, but))]
    if not runs:
        raise _none(pattern)
    return runs


def check_earlier_runs(pattern: str, but: Path) -> None:
    """Raise UserError where ``skip_existing`` names no run besides ``but``: before anything is written or loaded."""
    if not any(True for match in _matches(pattern) for _ in _runs(match, but)):
        raise _none(pattern)


def _none(pattern: str) -> UserError:
    return UserError(f"skip_existing={pattern} holds no earlier run (no {RECORDS}): name a run or the folder of runs")


def _matches(pattern: str) -> Iterator[str]:
    return glob.iglob(str(Path(pattern).expanduser()), recursive=True)


def _runs(match: str, but: Path | None) -> Iterator[Path]:
    """The runs that a folder is or holds, without ``but``."""
    alone = (Path(match) / RECORDS).is_file()
    found = [Path(match)] if alone else (path.parent for path in Path(match).rglob(RECORDS))
    return (path.absolute() for path in found if but is None or path.resolve() != but.resolve())


def twins(plan: Plan) -> dict[str, str]:
    """Item directory of each picture that an earlier prompt of the plan draws too -> that prompt's."""
    if not plan.duplicates:
        return {}
    involved = {id(prompt) for duplicate in plan.duplicates for prompt in (duplicate.prompt, duplicate.first)}
    names = {(id(i.prompt), i.seed): i.item_dir for i in plan.items if id(i.prompt) in involved}
    return {
        names[id(duplicate.prompt), seed]: names[id(duplicate.first), seed]
        for duplicate in plan.duplicates
        for seed in duplicate.seeds
    }


def adopt(
    run_dir: RunDirectory,
    ledger: Ledger,
    item: WorkItem,
    fingerprint: str,
    existing: Finished,
    recipe: dict[str, Any],
    *,
    output_file: Path | None = None,
    files: ShardFiles | None = None,
    sync: bool,
) -> None:
    """Make ``existing`` this item's picture: a hard link where the file system can, else a copy. Raises DiskError.

    ``output_file``: also put the picture there. ``files``: what writes shards, in a run that has them.
    """
    image = existing.entry.image
    result = {"image": image, "sha256": existing.entry.sha256, "bytes": existing.entry.size}
    head = record_head(item.item_dir, "ok", item.prompt_index, item.seed, fingerprint, **result)
    place: dict[str, Any] = {}
    tail = {
        "reused_from": str(existing.run / existing.item),
        "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    record = {
        **head,
        **_kept_fields(existing.record),
        **recipe,
        **tail,
    }
    try:
        if files is not None:
            place = files.add(_read(existing, run_dir, ledger), record)
        else:
            _link(run_dir, item.item_dir, existing, record, sync=sync)
        if output_file is not None:
            copy_to(output_file, existing.picture.read_bytes(), sync=sync)
    except OSError as error:
        raise atomic.disk_error(error, str(run_dir.path / item.item_dir)) from error
    line = {**head, **place, **tail}
    ledger.append(line, sync=sync)
    if files is not None:
        files.recorded(Filed(line=line))


def _read(existing: Finished, run_dir: RunDirectory, ledger: Ledger) -> bytes:
    """The file of a picture, which may have moved into another shard of the same run meanwhile. Raises OSError."""
    try:
        return existing.picture.read_bytes()
    except FileNotFoundError:
        now = ledger.entries.get(existing.item)
        if existing.run != run_dir.path or now is None or now == existing.entry:
            raise
        return Finished(existing.run, existing.item, now).picture.read_bytes()


def _link(run_dir: RunDirectory, item_dir: str, existing: Finished, record: dict[str, Any], *, sync: bool) -> None:
    """Put an existing picture into the item's own folder. Raises OSError."""
    image = existing.entry.image
    run_dir.make_dirs(item_dir, sync=sync)
    with atomic.directory(item_dir, run_dir.dir_fd) as folder:
        if existing.entry.place is not None:
            atomic.write_file(folder, image, existing.picture.read_bytes(), sync=sync)
        else:
            with (
                atomic.directory(existing.run) as other_run,
                atomic.directory(existing.item, other_run) as source,
            ):
                atomic.link_or_copy(source, image, folder, image, sync=sync)
        atomic.write_file(folder, RECORD, readable_json(record), sync=sync)
        if sync:
            atomic.sync_dir(folder, ".")


def _kept_fields(record: Inside) -> dict[str, Any]:
    """What the earlier record says about the picture itself."""
    try:
        value = from_json(record.read_bytes())
        return {key: value[key] for key in ("pixels_sha256", "seconds", "timings") if key in value}
    except (OSError, ValueError, AttributeError):
        return {}
