"""Random multiruns with random trouble, ended at random instants: each job has its own traces, nothing is lost."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.faulty_session import FakeOutOfMemory, FaultySession, picture
from zimage_runner.cli.main import main
from zimage_runner.config.schema import Composed, RunConfig
from zimage_runner.engines.base import GeneratedBatch, PendingImages
from zimage_runner.errors import BadPictureError
from zimage_runner.model import Dtype
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.writer import Writer
from zimage_runner.plan import WorkItem
from zimage_runner.runner.execute import execute
from zimage_runner.runner.run import Run

TEXT = "a cat"
ARRIVAL = 0.01
"""Seconds after which a picture comes though no further batch was submitted."""
EARLIER = range(900, 906)
"""Seeds that an earlier run drew."""
PLACES = ("compose", "plan", "lease", "submit", "write", "report")
"""Where a signal comes."""
PERMANENT = ("bad", "raise", "oom")
"""Trouble that fails an item; it is gone when the multirun is resumed."""
STOPPING = ("lost", "lost late", "disk")
"""Trouble that stops a job."""


@dataclass(frozen=True)
class Swept:
    """One job of a random multirun."""

    kind: str
    """draws, refused, dry, skips (an earlier run has all its pictures)."""
    pictures: int
    batch_size: int
    dtype: str
    faults: tuple[str, ...]
    """Of its first pictures."""

    def seeds(self, number: int) -> range:
        if self.kind == "skips":
            return EARLIER[: self.pictures]
        return range(100 * number + 1, 100 * number + 1 + self.pictures)

    def settle(self, config: RunConfig, number: int, earlier: Path) -> None:
        """Make the composed config this job's: composing so many different ones would take the time of all else."""
        config.seeds = list(self.seeds(number))
        config.engine.batch_size = self.batch_size
        config.model.dtype = Dtype[self.dtype]
        config.dry_run = self.kind == "dry"
        config.sampling.height = 100 if self.kind == "refused" else 128
        config.skip_existing = str(earlier) if self.kind == "skips" else None


FAULTS = st.sampled_from(["", "", "", "bad once", "oom of two", *PERMANENT, *STOPPING])
JOBS = st.builds(
    Swept,
    kind=st.sampled_from(["draws"] * 6 + ["refused", "dry", "skips"]),
    pictures=st.integers(1, 5),
    batch_size=st.integers(1, 3),
    dtype=st.sampled_from(["auto", "auto", "float32"]),
    faults=st.lists(st.sampled_from(["", "", "", "bad once", "oom of two", *PERMANENT, *STOPPING]), max_size=5).map(
        tuple
    ),
)


@dataclass
class World:
    """What the pretended GPU and disk do to which seed, and what was asked of them."""

    faults: dict[int, str]
    stop_at: tuple[str, int] | None
    drawn: Counter[int] = field(default_factory=Counter)
    visits: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    signalled: bool = False
    lock: Any = field(default_factory=threading.Lock)
    submitted: threading.Event = field(default_factory=threading.Event)

    def visit(self, place: str) -> None:
        with self.lock:
            self.visits[place] += 1
            now = self.stop_at == (place, self.visits[place])
            self.signalled |= now
        if now:
            os.kill(os.getpid(), signal.SIGTERM)


class Arriving(PendingImages):
    def __init__(self, pixels: np.ndarray, error: Exception | None, next_batch: threading.Event) -> None:
        self._pixels, self._error, self._next_batch = pixels, error, next_batch

    def wait(self) -> np.ndarray:
        self._next_batch.wait(ARRIVAL)
        if self._error is not None:
            raise self._error
        return self._pixels


LOST = "CUDA error: an illegal memory access was encountered"


class Session(FaultySession):
    world: World

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.lost = False

    def start(self) -> None:
        self.world.visit("lease")

    def extend(self, *_: Any) -> None:
        self.world.visit("lease")

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        world = self.world
        world.submitted.set()
        world.submitted = threading.Event()
        world.visit("submit")
        found = {world.faults.get(i.seed, "") for i in items}
        if self.lost or "lost" in found:
            self.lost = True
            raise RuntimeError(LOST)
        if "raise" in found:
            raise ValueError("this item cannot be drawn")
        if "oom" in found or ("oom of two" in found and len(items) > 1):
            raise FakeOutOfMemory("CUDA out of memory")
        error = None
        if "lost late" in found:
            self.lost, error = True, RuntimeError(LOST)
        elif "bad" in found or ("bad once" in found and attempt == 1):
            error = BadPictureError("the decoder's output holds NaN or Inf")
        if error is None:
            world.drawn.update(i.seed for i in items)
        pixels = np.stack([picture(i.prompt.text, i.seed, i.params.height, i.params.width) for i in items])
        return GeneratedBatch(images=Arriving(pixels, error, world.submitted), details={})


@contextmanager
def inhabited(world: World) -> Iterator[None]:
    """The program in this world."""
    from zimage_runner.cli.sweep import launcher
    from zimage_runner.runner import execute as runner

    def visiting(place: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            world.visit(place)
            return real(*args, **kwargs)

        return call

    write = Writer._write_item

    def write_item(self: Writer, job: Any, *rest: Any) -> Any:
        world.visit("write")
        if world.faults.get(job.seed) == "disk":
            raise OSError(28, "No space left on device")
        return write(self, job, *rest)

    with ExitStack() as patches:
        for patch in (
            mock.patch("zimage_runner.runner.pool.Session", type("Session", (Session,), {"world": world})),
            mock.patch.object(launcher, "run_job", visiting("compose", launcher.run_job)),
            mock.patch.object(runner, "plan_run", visiting("plan", runner.plan_run)),
            mock.patch.object(Run, "report", visiting("report", Run.report)),
            mock.patch.object(Writer, "_write_item", write_item),
        ):
            patches.enter_context(patch)
        yield


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has what jobs of the kind ``skips`` skip."""
    folder = tmp_path_factory.mktemp("earlier")
    with inhabited(World(faults={}, stop_at=None)):
        seeds = f"seeds={list(EARLIER)}".replace(" ", "")
        code, _, err = command(folder, f"prompt={TEXT}", seeds, "output.fsync=never", "hydra.run.dir=run")
    assert code == 0, err
    return folder / "run"


def command(folder: Path, *argv: str, take: Callable[[Composed], int | Future[int]] = execute) -> tuple[int, str, str]:
    """Run one command line in that folder: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv, take)
    return code, out.getvalue(), err.getvalue()


def traces(folder: Path, seeds: Sequence[int]) -> tuple[set[int], set[int]]:
    """Seeds that a job has done and failed; all that its directory holds is sound and its own."""
    ledger = Ledger.load(folder / "records.jsonl")
    assert ledger.damaged == 0
    done, failed = set(), set()
    for item_dir, entry in ledger.entries.items():
        record = json.loads((folder / item_dir / "record.json").read_bytes())
        (done if entry.ok else failed).add(record["seed"])
        if entry.ok:
            png = (folder / item_dir / "image.png").read_bytes()
            assert hashlib.sha256(png).hexdigest() == entry.sha256 == record["sha256"]
            pixels = picture(TEXT, record["seed"], 128, 128)
            assert record.get("pixels_sha256") == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert done | failed <= set(seeds)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_bytes().splitlines()]
    finished = [line["item"] for line in lines if line["status"] == "ok"]
    assert len(finished) == len(set(finished)), "an item was finished twice"
    assert not list(folder.rglob("*.tmp"))
    return done, failed


def check_job(job: Swept, number: int, folder: Path, world: World, row: dict[str, str], passes: int) -> set[int]:
    """A job's directory and its row of the table agree; its finished seeds."""
    seeds = set(job.seeds(number))
    if not (folder / "records.jsonl").exists():
        assert row["status"] in ("not run", "refused", "failed"), row
        assert row["status"] != "failed" or job.kind == "dry"
        return set()
    done, failed = traces(folder, sorted(seeds))
    summary = json.loads((folder / "summary.json").read_bytes())
    items, remaining = summary["items"], len(seeds - done - failed)
    assert items["planned"] == len(seeds)
    assert items["ok"] + items["linked"] + items["done_before"] == len(done) == int(row["done"])
    assert items["failed"] == len(failed) == int(row["failed"]) == len(summary["failed"])
    assert items["remaining"] == remaining
    status = "stopped" if remaining else "failures" if failed else "complete"
    assert row["status"] == summary["status"] == status
    assert all(world.faults.get(seed) in PERMANENT for seed in failed), failed
    stopping = any(world.faults.get(seed) in STOPPING for seed in range(1000))
    assert not remaining or world.signalled or stopping
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert log.count("the run ended") <= passes
    assert len(re.findall(r"pictures? to draw", log)) == log.count("the run ended")
    redrawn = {int(line.rpartition("seed_")[2].partition(":")[0]) for line in log.splitlines() if "once more" in line}
    assert redrawn <= seeds
    return done


def check(jobs: list[Swept], keep_going: bool, stop_at: tuple[str, int] | None, earlier: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        faults = {
            seed: fault
            for number, job in enumerate(jobs)
            if job.kind == "draws"
            for seed, fault in zip(job.seeds(number), job.faults, strict=False)
        }
        world = World(faults=faults, stop_at=stop_at)
        names = ",".join(f"job{number}" for number in range(len(jobs)))
        sweep = folder / "sweep"
        threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        take = functools.partial(settled, jobs, earlier)
        with inhabited(world):
            code, out, err = command(
                folder, "-m", f"prompt={TEXT}", f"name={names}", f"hydra.sweep.dir={sweep}", "output.fsync=never",
                "hydra.callbacks.sweep_report.grid=false", f"hydra.launcher.keep_going={str(keep_going).lower()}",
                take=take,
            )  # fmt: skip
        assert "Traceback" not in err, err
        settle(threads, descriptors)
        rows = read_rows(sweep)
        done = [
            check_job(job, number, sweep / str(number), world, rows.get(number, {"status": "not run"}), 1)
            for number, job in enumerate(jobs)
        ]
        check_code(jobs, code, done, world, keep_going, err)
        check_order(jobs, out, sweep)
        if world.signalled and code == 130:
            assert "to finish the whole multirun" in err, err
        if not sweep.exists():
            assert world.signalled or all(job.kind in ("dry", "refused") for job in jobs), "a job that began is gone"
            assert not any(done)
            return
        calm = World(faults={}, stop_at=None)
        with inhabited(calm):
            code, out, err = command(folder, f"resume={sweep}", take=take)
        assert "Traceback" not in err, err
        settle(threads, descriptors)
        rows = read_rows(sweep)
        refused = any(job.kind == "refused" for job in jobs)
        assert code == (2 if refused else 0), err
        for number, job in enumerate(jobs):
            assert calm.drawn.keys().isdisjoint(done[number]), "drawn twice"
            if job.kind in ("draws", "skips") and (keep_going or not refused):  # else some may not be reached
                now = check_job(job, number, sweep / str(number), calm, rows[number], 2)
                assert now == set(job.seeds(number)), err
        assert all(count == 1 for count in calm.drawn.values())
        check_order(jobs, out, sweep)


def settled(jobs: list[Swept], earlier: Path, composed: Composed) -> int | Future[int]:
    number = int(composed.config.name.removeprefix("job"))
    jobs[number].settle(composed.config, number, earlier)
    return execute(composed)


def settle(threads: set[threading.Thread], descriptors: int) -> None:
    """Threads and files of the jobs are gone; the thread that counts signals takes an instant."""
    for thread in set(threading.enumerate()) - threads:
        if thread.name in ("signals", "deadline"):
            thread.join(60)
    own = set(threading.enumerate()) - threads
    assert all(type(thread).__name__ == "TMonitor" for thread in own), own
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def read_rows(sweep: Path) -> dict[int, dict[str, str]]:
    path = sweep / "summary.csv"
    if not path.exists():
        return {}
    return {int(row["job"]): row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}


def check_code(jobs: list[Swept], code: int, done: list[set[int]], world: World, keep_going: bool, err: str) -> None:
    complete = all(
        job.kind == "dry" or done[n] == set(job.seeds(n)) for n, job in enumerate(jobs) if job.kind != "refused"
    )
    refused = any(job.kind == "refused" for job in jobs)
    if world.signalled:
        failed = any(fault in PERMANENT for fault in world.faults.values())
        wrong = (code == 2 and not refused) or (code == 1 and not failed) or "not done" in err
        assert code == 130 or not wrong, (code, err)
        assert code or complete, err
    elif any(fault in STOPPING for fault in world.faults.values()):
        assert code in ((130,) if keep_going else (1, 2, 130)), (code, err)
    elif refused and keep_going:
        assert code == 2, err
    elif keep_going:
        assert code == (0 if complete else 1), err
        assert complete == (not any(fault in PERMANENT for fault in world.faults.values()))
    else:
        assert (code == 0) == (complete and not refused), err


def check_order(jobs: list[Swept], out: str, sweep: Path) -> None:
    """Each job's directory is printed once, in the order in which they ran."""
    printed = [int(Path(line).name) for line in out.splitlines() if line.startswith(f"{sweep}/")]
    assert printed == sorted(printed)


MULTIRUNS = {
    "jobs": st.lists(JOBS, min_size=1, max_size=4),
    "keep_going": st.sampled_from([True, True, False]),
    "stop_at": st.none() | st.tuples(st.sampled_from(PLACES), st.integers(1, 6)),
}


@settings(max_examples=4)
@given(**MULTIRUNS)
def test_a_few_multiruns(earlier: Path, jobs: list[Swept], keep_going: bool, stop_at: tuple[str, int] | None) -> None:
    check(jobs, keep_going, stop_at, earlier)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300)
@given(**MULTIRUNS)
def test_many_multiruns(earlier: Path, jobs: list[Swept], keep_going: bool, stop_at: tuple[str, int] | None) -> None:
    check(jobs, keep_going, stop_at, earlier)
