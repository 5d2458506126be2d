"""Pictures, requests and an open run directory for the output tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zimage_runner.outputs.config import Output
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.writer import Outcome, Writer, WriteRequest

PARAMS = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 8,
    "guidance_scale": 0.0,
    "negative_prompt": "",
    "max_sequence_length": 512,
    "cfg_normalization": 0.0,
    "cfg_truncation": 1.0,
}


def noise_pictures(count: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 [count, 32, 48, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def request(seed: int = 1, *, index: int = 0, prompt: str = "a cat", **fields: Any) -> WriteRequest:
    """A request for item items/000<index>_a/seed_<seed>."""
    recipe = {"prompt": prompt, "params": PARAMS, "model": {"name": "nano", "digest": "0123456789abcdef"}}
    return WriteRequest(
        item_dir=f"items/{index:04d}_a/seed_{seed}",
        index=index,
        seed=seed,
        fingerprint="f" * 16,
        recipe=fields.pop("recipe", recipe),
        **fields,
    )


class OpenRun:
    """A run directory, its ledger and a writer whose outcomes are collected."""

    def __init__(self, path: Path, output: Output) -> None:
        self.dir = RunDirectory.create(path)
        self.ledger = Ledger.load(self.dir.records_path).open(self.dir.dir_fd)
        self.outcomes: list[Outcome] = []
        self.writer = Writer(self.dir, self.ledger, output, self.outcomes.append)


@contextlib.contextmanager
def open_run(path: Path, **options: Any) -> Iterator[OpenRun]:
    run = OpenRun(path, Output(**{"min_free_gb": 0.0, **options}))
    try:
        yield run
    finally:
        with contextlib.suppress(Exception):
            run.writer.close()
        run.ledger.close()
        run.dir.close()
