"""Commands as real processes, and the resident process that they find in a cache of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 120.0
SMALL = [
    "model=zimage_nano", "model.native_sizes=[]", "sampling.height=64", "sampling.width=64",
    "sampling.num_inference_steps=1", "output.min_free_gb=0", "warmup=none",
]  # fmt: skip


class Place:
    """A folder to run commands in, and the resident process that they find."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "ZIMAGE_RUNNER_CACHE": str(cache)}
        self.environment.pop("PYTEST_ADDOPTS", None)
        self._warmed = 0

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Begin a command."""
        environment = {**self.environment, **options.pop("environment", {})}
        return subprocess.Popen(
            [sys.executable, "-m", "zimage_runner", *words],
            cwd=options.pop("cwd", self.folder),
            env=environment,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            **options,
        )

    def run(self, *words: str, input: str | None = None, **options: Any) -> tuple[int, str, str]:
        """Run a command: exit code, stdout, stderr."""
        process = self.start(*words, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, **options)
        out, err = process.communicate(input, timeout=PATIENCE)
        return process.returncode, out, err

    def draw(self, *words: str, **options: Any) -> tuple[int, str, str]:
        """Run a command that draws small pictures with the resident process."""
        return self.run(*SMALL, "executor=resident", *words, **options)

    def pid(self) -> int | None:
        """The resident process that these commands find."""
        line = self.run("resident", "status")[1]
        return int(line.split()[1].rstrip(",")) if line.startswith("process ") else None

    def warm(self) -> int:
        """The resident process, its model loaded and ready for these commands, whatever another test left behind."""
        self._warmed += 1
        code, _, err = self.draw("prompt=a cat", f"hydra.run.dir=warm{self._warmed}")
        assert code == 0, err
        pid = self.pid()
        assert pid is not None
        return pid

    def wait_for(self, what: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
        """Wait until something is there, as long as ``process`` lives."""
        end = time.monotonic() + PATIENCE
        while not (found := what()):
            assert time.monotonic() < end, "it did not come"
            assert process is None or process.poll() is None, process.communicate()
            time.sleep(0.005)
        return found
