"""Where the time to the first picture goes, in one fresh process of the command line:

    python -m benchmarks.first_picture out.json -- model=local model.path=/data/turbo prompt="a red fox" seeds=[0]

Marks are seconds since the process was started by the kernel, those of a forked child among them (they say so); nothing
of the run itself is changed. What the time within a stage is spent on, a sampling profiler says (py-spy).
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "numpy", "diffusers", "transformers", "tokenizers", "hydra", "PIL")
STAGES = {
    "zimage_runner.startup.fork": {"Child.receive": "wait for the config"},
    "zimage_runner.runner.execute": {"execute": "run"},
    "zimage_runner.runner.spec": {"plan_run": "plan"},
    "zimage_runner.weights.preload.source": {"begin": "weights begin"},
    "zimage_runner.weights.preload.preload": {"Preload._tell": "preload"},
    "zimage_runner.engines.native.engine": {
        "NativeEngineAdapter._load_encoder": "text encoder",
        "NativeEngineAdapter._load_denoiser": "transformer and decoder",
    },
    "zimage_runner.engines.native.model": {
        "NativeModel.encode": "encode captions",
        "NativeModel._refine": "refine a caption",
        "NativeModel._make_tables": "rotary tables",
        "NativeModel._make_steps": "modulation",
        "NativeModel._forward": "forward",
    },
    "zimage_runner.session": {"Session.start": "session start", "Session.generate": "generation"},
}
"""What is marked, by module: its functions and what their marks are called."""


class Marks:
    """(name, seconds since the process began); kept in a file, to which a forked child adds its own."""

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        began = ticks / os.sysconf("SC_CLK_TCK")  # in ticks of 10 ms
        self._clock_offset = time.clock_gettime(time.CLOCK_BOOTTIME) - began - time.monotonic()
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

    def around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The function, with marks at beginning and end of every call; what a thread tells is part of the name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            name = " ".join([label, *(word for word in args if isinstance(word, str))])
            self(f"{name} ...")
            try:
                result = function(*args, **kwargs)
                if label == "generation":
                    self(f"{name} queued {result.details['timings']}")
                    result.images.wait()
            finally:
                self(f"{name} done")
            return result

        return timed


class ImportMarks(importlib.abc.MetaPathFinder):
    """Marks when the import of a library begins and ends; puts marks around the runner's stages once they are there."""

    def __init__(self, mark: Marks) -> None:
        self._mark = mark

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in LIBRARIES and fullname not in STAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, fullname)
        return spec

    def _wrap(self, loader: Any, name: str) -> None:
        run: Callable[[Any], None] = loader.exec_module

        def exec_module(module: Any) -> None:
            (self._mark.around(run, f"import {name}") if name in LIBRARIES else run)(module)
            for stage, label in STAGES.get(name, {}).items():
                place, _, function = stage.rpartition(".")
                owner = operator.attrgetter(place)(module) if place else module
                setattr(owner, function, self._mark.around(getattr(owner, function), label))

        loader.exec_module = exec_module


def main() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(sys.argv[1:cut])
    mark = Marks()
    mark("script")
    sys.meta_path.insert(0, ImportMarks(mark))
    from zimage_runner.__main__ import _run, listen

    listen()
    code = _run(sys.argv[cut + 1 :])
    mark(f"exit {code}")
    args.out.write_text(json.dumps(mark.in_order(), indent=1) + "\n", encoding="utf-8")
    for name, seconds in mark.in_order():
        print(f"{seconds:8.3f}  {name}")


if __name__ == "__main__":
    main()
