"""Where the time to the first picture goes, in one fresh process of the command line:

    python -m benchmarks.first_picture out.json -- model=local model.path=/data/turbo prompt="a red fox" seeds=[0]
    python -m benchmarks.first_picture out.json --profile out.txt -- ...     # also what the first generation called

Marks are seconds since the process was started by the kernel, those of a forked child among them (they say so); nothing
of the run itself is changed. ``--profile`` slows the generation that it looks at.
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
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "numpy", "diffusers", "transformers", "tokenizers", "hydra", "PIL")
PROFILE_LINES = 70


def since_start() -> float:
    """Seconds since the kernel started this process (resolution: a clock tick, 10 ms)."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Marks:
    """(name, seconds since the process began); kept in a file, to which a forked child adds its own."""

    def __init__(self) -> None:
        self._clock_offset = since_start() - time.monotonic()
        self._pid = os.getpid()
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - open as long as the process

    def __call__(self, name: str) -> None:
        who = "" if os.getpid() == self._pid else "child: "
        mark = (f"{who}{name}", round(time.monotonic() + self._clock_offset, 3))
        self._file.write(json.dumps(mark).encode() + b"\n")

    def in_order(self) -> list[tuple[str, float]]:
        """All of them, by time."""
        self._file.seek(0)
        return sorted((tuple(json.loads(line)) for line in self._file), key=lambda mark: mark[1])

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
    """Marks when the import of a library begins and ends; watches modules of the runner once they are there."""

    def __init__(self, mark: Marks, watchers: Mapping[str, Callable[[Any], None]]) -> None:
        self.mark = mark
        self.watchers = watchers

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in LIBRARIES and fullname not in self.watchers:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, fullname)
        return spec

    def _wrap(self, loader: Any, name: str) -> None:
        run: Callable[[Any], None] = loader.exec_module

        def exec_module(module: Any) -> None:
            if name in LIBRARIES:
                self.mark(f"import {name} ...")
            run(module)
            if name in LIBRARIES:
                self.mark(f"import {name} done")
            if name in self.watchers:
                self.watchers[name](module)

        loader.exec_module = exec_module


def watchers(mark: Marks, profile: Path | None) -> dict[str, Callable[[Any], None]]:
    """What puts marks around the stages of a run, by the module it is done to."""
    return {
        "zimage_runner.startup.fork": lambda module: watch_head_start(mark, module),
        "zimage_runner.runner.execute": lambda module: mark.around(module, "execute", "run"),
        "zimage_runner.runner.spec": lambda module: mark.around(module, "plan_run", "plan"),
        "zimage_runner.weights.preload.source": lambda module: mark.around(module, "begin", "weights begin"),
        "zimage_runner.weights.preload.preload": lambda module: mark_told(mark, module.Preload, "_tell", "preload"),
        "zimage_runner.engines.native.engine": lambda module: watch_engine(mark, module.NativeEngineAdapter),
        "zimage_runner.engines.native.model": lambda module: watch_model(mark, module.NativeModel),
        "zimage_runner.session": lambda module: watch_session(mark, module.Session, profile),
    }


def watch_head_start(mark: Marks, module: Any) -> None:
    """Mark what the main thread waits for."""
    mark.around(module.Child, "receive", "wait for the config")


def mark_told(mark: Marks, owner: Any, name: str, label: str) -> None:
    """Mark what a thread says of its progress, such as what arrived on the GPU."""
    tell = getattr(owner, name)

    def marked(self: Any, what: str) -> Any:
        mark(f"{label}: {what}")
        return tell(self, what)

    setattr(owner, name, marked)


def watch_engine(mark: Marks, Engine: Any) -> None:
    """Mark when each network is taken over."""
    mark.around(Engine, "_load_encoder", "text encoder")
    mark.around(Engine, "_load_denoiser", "transformer and decoder")


def watch_model(mark: Marks, Model: Any) -> None:
    """Mark the host's part of each first use."""
    for name, label in (
        ("encode", "encode captions"),
        ("_refine", "refine a caption"),
        ("_make_tables", "rotary tables"),
        ("_make_steps", "modulation"),
        ("_forward", "forward"),
    ):
        mark.around(Model, name, label)


def watch_session(mark: Marks, Session: Any, profile: Path | None) -> None:
    """Put marks around a session's start and its generations."""
    mark.around(Session, "start", "session start")
    generate = Session.generate
    calls = 0

    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
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
            with profile.open("w", encoding="utf-8") as stream:
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
    sys.meta_path.insert(0, ImportMarks(mark, watchers(mark, args.profile)))
    from zimage_runner.__main__ import _run, listen

    listen()
    code = _run(sys.argv[cut + 1 :])
    mark(f"exit {code}")
    args.out.write_text(json.dumps(mark.in_order(), indent=1) + "\n", encoding="utf-8")
    for name, seconds in mark.in_order():
        print(f"{seconds:8.3f}  {name}")


if __name__ == "__main__":
    main()
