"""Where the time to the first picture goes, in one fresh process of the command line:

    python -m benchmarks.first_picture out.json -- model=local model.path=/data/turbo prompt="a red fox" seeds=[0]
    python -m benchmarks.first_picture out.json --profile out.txt -- ...     # also what the first generation called

Marks are seconds since the process was started by the kernel; nothing of the run itself is changed. ``--profile`` slows
the generation that it looks at.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.abc
import importlib.machinery
import json
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "numpy", "diffusers", "transformers", "tokenizers", "hydra", "PIL")
PROFILE_LINES = 70


def since_start() -> float:
    """Seconds since the kernel started this process (resolution: a clock tick, 10 ms)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Marks:
    """(name, seconds since the process began), in order."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def __call__(self, name: str) -> None:
        self.marks.append((name, round(since_start(), 3)))

    def around(self, owner: Any, name: str, label: str) -> None:
        """Mark beginning and end of every call of ``owner.name``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self(f"{label} ...")
            try:
                return function(*args, **kwargs)
            finally:
                self(f"{label} done")

        setattr(owner, name, timed)


class ImportMarks(importlib.abc.MetaPathFinder):
    """Marks when the import of a library begins and ends."""

    def __init__(self, mark: Marks) -> None:
        self.mark = mark

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in LIBRARIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, fullname)
        return spec

    def _wrap(self, loader: Any, name: str) -> None:
        run: Callable[[Any], None] = loader.exec_module

        def exec_module(module: Any) -> None:
            self.mark(f"import {name} ...")
            run(module)
            self.mark(f"import {name} done")

        loader.exec_module = exec_module


def watch(mark: Marks, profile: Path | None) -> None:
    """Put marks around the stages of a run."""
    from zimage_runner.session import Session
    from zimage_runner.weights import source

    mark.around(source, "begin", "weights begin")
    mark.around(Session, "start", "session start")
    generate = Session.generate
    calls = 0

    def marked(self: Session, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        mark(f"generation {calls} ...")
        profiler = cProfile.Profile() if profile is not None and calls == 1 else None
        if profiler is not None:
            profiler.enable()
        batch = generate(self, *args, **kwargs)
        mark(f"generation {calls} queued {batch.details['timings']}")
        batch.images.wait()
        mark(f"generation {calls} done")
        if profiler is not None and profile is not None:
            profiler.disable()
            with profile.open("w") as stream:
                for order in ("cumulative", "tottime"):
                    pstats.Stats(profiler, stream=stream).sort_stats(order).print_stats(PROFILE_LINES)
        return batch

    Session.generate = marked


def main() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args(sys.argv[1:cut])
    mark = Marks()
    mark("script")
    sys.meta_path.insert(0, ImportMarks(mark))
    from zimage_runner.cli import main as run

    mark("command line imported")
    watch(mark, args.profile)
    code = run(sys.argv[cut + 1 :])
    mark(f"exit {code}")
    args.out.write_text(json.dumps(mark.marks, indent=1) + "\n")
    for name, seconds in mark.marks:
        print(f"{seconds:8.3f}  {name}")


if __name__ == "__main__":
    main()
