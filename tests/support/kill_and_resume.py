"""Run the program again and again, killing it (SIGKILL) at random instants, until each run directory is finished.

A program of its own, started by test_kill.py: it imports the libraries once and forks a fresh process for every
attempt, so that fifty attempts take a minute instead of ten.

    python kill_and_resume.py KILLS SEED FOLDER

Prints one JSON line: the finished run directories, the kills that hit a living process, and each attempt's fate.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from hydra.core.plugins import Plugins
from PIL import Image

from zimage_runner.cli.main import main
from zimage_runner.config.registry import register
from zimage_runner.engines.native import engine as _native  # noqa: F401
from zimage_runner.runner import execute as _runner  # noqa: F401  (these two are imported before the forks)

SETTINGS = [
    "prompts.texts=['a red apple','一只猫']",
    "seeds=0-2",
    "sampling.num_inference_steps=1",
    "warmup=none",
    "engine.batch_size=2",
]


def attempt(argv: list[str], kill_after: float | None) -> int | None:
    """Exit code of one fresh process, or None if it was killed."""
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        code = 70
        try:
            code = main(argv)
        finally:
            os._exit(code)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def start_or_resume(directory: Path) -> list[str]:
    if (directory / ".hydra" / "overrides.yaml").exists():
        return [f"resume={directory}"]
    return [*SETTINGS, f"hydra.run.dir={directory}"]


def torture(kills: int, rng: random.Random, folder: Path) -> dict:
    started = time.monotonic()
    if (code := attempt(start_or_resume(folder / "reference"), None)) != 0:
        raise SystemExit(f"the reference run ended with {code}")
    whole = time.monotonic() - started
    runs, fates, hits = [folder / "reference"], Counter(), 0
    while hits < kills:
        directory = folder / f"run{len(runs)}"
        while (code := attempt(start_or_resume(directory), rng.uniform(0, whole) if hits < kills else None)) != 0:
            fates[str(code)] += 1
            if code is not None:
                raise SystemExit(f"{directory} ended with {code}")
            hits += 1
        runs.append(directory)
    return {"runs": [str(run) for run in runs], "hits": hits, "fates": fates}


if __name__ == "__main__":
    torch.set_num_threads(1)
    register()
    Plugins.instance()
    Image.init()
    gc.freeze()  # a fork's collections neither walk over the libraries nor copy their pages
    print(json.dumps(torture(int(sys.argv[1]), random.Random(int(sys.argv[2])), Path(sys.argv[3]))))
