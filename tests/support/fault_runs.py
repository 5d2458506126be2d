"""The whole program with a session that draws instantly and misbehaves on demand, in a process of its own.

Processes are forked from a server that has imported everything, so that hundreds of them can be killed in a minute.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from PIL import Image

from tests.support.faulty_session import FaultySession, picture
from tests.support.shards import check_shards
from zimage_runner.cli.hydra_patches import keep_what_was_composed
from zimage_runner.cli.main import main
from zimage_runner.cli.sweep.launcher import register_launcher
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register
from zimage_runner.outputs.finished import Finished
from zimage_runner.outputs.ledger import Entry, Ledger
from zimage_runner.outputs.metadata import read_metadata
from zimage_runner.runner import execute as runner  # noqa: F401  # imported here once, for all the forks
from zimage_runner.runner import pool as warm

PROMPTS = ["a cat", "一只猫"]

# What every command would otherwise do again in each fork.
register()
register_launcher()
Plugins.instance()
keep_what_was_composed()
with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
    compose("config")
Image.init()
np.random.default_rng(0)

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.support.fault_runs"])


def run_cli(argv: list[str], environment: dict[str, str], log: str) -> None:
    """In the forked process."""
    os.environ.update(environment)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the suite runs in the background or under nohup
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    warm.Session = FaultySession  # type: ignore[misc, assignment]
    sys.exit(main(argv))


@dataclass
class Run:
    """One run directory and the processes that work on it, one after the other."""

    folder: Path
    """Holds the run directory, the log of all processes and the counters of faults."""
    seeds: int = 6
    overrides: list[str] = field(default_factory=list)
    variables: dict[str, object] = field(default_factory=dict)
    run_dir: Path = Path()

    def __post_init__(self) -> None:
        if self.run_dir == Path():
            self.run_dir = self.folder / "run"

    @property
    def started(self) -> bool:
        return (self.run_dir / ".hydra" / "overrides.yaml").exists()

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def argv(self) -> list[str]:
        if self.started:
            return [f"resume={self.run_dir}", *self.overrides]
        prompts = json.dumps(PROMPTS, ensure_ascii=False)
        return [
            f"prompts.texts={prompts}", f'seeds="0-{self.seeds - 1}"', f"hydra.run.dir={self.run_dir}",
            f"output.root={self.folder}", "output.min_free_gb=0", "warmup=none", *self.overrides,
        ]  # fmt: skip

    def start(self, *faults: dict[str, Any], **variables: object) -> BaseProcess:
        """Begin or continue the run in a new process."""
        environment = {
            "FAULTS": json.dumps(faults), "FAULTS_DIR": str(self.folder),
            **{f"FAULTS_{k}": str(v) for k, v in {**self.variables, **variables}.items()},
        }  # fmt: skip
        process = _forks.Process(target=run_cli, args=(self.argv(), environment, str(self.folder / "log")))
        process.start()
        return process

    def execute(self, *faults: dict[str, Any], **variables: object) -> int:
        """Begin or continue the run and wait; the exit code."""
        process = self.start(*faults, **variables)
        process.join(60)
        assert process.exitcode is not None, f"still running\n{self.log}"
        return process.exitcode

    def wait_for_pictures(self, process: BaseProcess, count: int = 1) -> None:
        """Until the ledger has so many more lines, or the process has ended."""
        records = self.run_dir / "records.jsonl"
        lines = records.read_bytes().count(b"\n") if records.exists() else 0
        deadline = time.monotonic() + 30
        while process.is_alive() and time.monotonic() < deadline:
            if records.exists() and records.read_bytes().count(b"\n") >= lines + count:
                return
            time.sleep(0.002)

    def items(self) -> dict[str, tuple[str, int]]:
        """item_dir -> (text, seed) of the whole plan."""
        slugs = ["00000_a_cat", "00001_一只猫"]
        return {
            f"items/{slug}/seed_{s}": (text, s)
            for slug, text in zip(slugs, PROMPTS, strict=True)
            for s in range(self.seeds)
        }

    def check(self, *, complete: bool = True, failed: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Nothing lost, doubled, half-written or different from an undisturbed run; ``failed``: seeds that may lack."""
        ledger = Ledger.load(self.run_dir / "records.jsonl")
        assert ledger.damaged == 0
        plan = self.items()
        assert ledger.entries.keys() <= plan.keys()
        for item_dir, (text, seed) in plan.items():
            entry = ledger.entries.get(item_dir)
            if entry is not None and entry.ok:
                check_item(self.run_dir, item_dir, entry, text, seed)
            elif complete:
                assert entry is not None, f"{item_dir} is missing\n{self.log}"
                assert seed in failed, f"{item_dir} failed\n{self.log}"
        if complete:
            assert not list(self.run_dir.rglob("*.tmp"))
        records = self.run_dir / "records.jsonl"
        if not records.exists():  # killed before it began the ledger
            assert not complete
            assert not list(self.run_dir.rglob("image.*"))
            return
        lines = records.read_bytes().splitlines(keepends=True)
        good = [json.loads(line) for line in lines if line.endswith(b"\n") and b'"status":"ok"' in line]
        drawn = {(line["item"], line["written"]) for line in good}  # one that moved to another shard has a second line
        assert len(drawn) == len({item for item, _ in drawn}), "an item was finished twice"
        if complete and (self.run_dir / "shards").exists():
            check_shards(self.run_dir)


def check_item(run_dir: Path, item_dir: str, entry: Entry, text: str, seed: int) -> None:
    import hashlib

    finished = Finished(run_dir, item_dir, entry)
    png = finished.picture.read_bytes()
    assert hashlib.sha256(png).hexdigest() == entry.sha256
    record = json.loads(finished.record.read_bytes())
    assert (record["status"], record["sha256"], record["prompt"], record["seed"]) == ("ok", entry.sha256, text, seed)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), picture(text, seed, 128, 128))
    recipe = read_metadata(io.BytesIO(png)).recipe
    assert recipe is not None
    assert recipe["prompt"] == text


def children_of(parent: int) -> list[int]:
    """Living child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: list[int], within_s: float = 10.0) -> bool:
    """Whether these processes end by themselves. On a busy machine even a killed one takes its time."""
    deadline = time.monotonic() + within_s
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":  # with a terminal or other surroundings of its own
    warm.Session = FaultySession  # type: ignore[misc, assignment]
    sys.exit(main(sys.argv[1:]))
