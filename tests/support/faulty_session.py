"""A session without a model: instant deterministic pictures, and every kind of trouble on chosen seeds.

The trouble is read from the environment, so that it reaches worker processes and whole runs alike:
FAULTS = JSON list of {"on": seed or "start", "kind": .., "times": n, ..}; FAULTS_DIR counts across processes.
gate.py holds sessions up before their next picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.gate import wait_at_gate
from zimage_runner.engines.base import GeneratedBatch, ReadyImages
from zimage_runner.errors import UserError
from zimage_runner.executors.base import BatchResult, BrokenImages
from zimage_runner.plan import Bucket, Encoding, WorkItem
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import SamplingParams

SIDE = 32
PARAMS = SamplingParams(
    height=SIDE, width=SIDE, num_inference_steps=8, guidance_scale=0.0, negative_prompt="", max_sequence_length=512,
    cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip
BUCKET = Bucket.of(PARAMS, caption_tokens=32, negative_caption_tokens=0)


def item(seed: int, text: str = "a cat") -> WorkItem:
    return WorkItem(prompt_index=0, seed=seed, prompt=Prompt(text=text), params=PARAMS, bucket=BUCKET)


def picture(text: str, seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """The one right picture of an item."""
    digest = hashlib.sha256(f"{text}/{seed}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


class FakeOutOfMemory(RuntimeError):
    pass


FakeOutOfMemory.__name__ = "OutOfMemoryError"


class FaultySession:
    """Takes what Session takes, and ignores it."""

    def __init__(self, *_: Any) -> None:
        self.items = 0
        self.calls: list[tuple[int, int, bool]] = []

    def start(self) -> None:
        time.sleep(float(os.environ.get("FAULTS_START_SECONDS", "0")))
        for fault in faults("start"):
            misbehave(fault)

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        self.calls.append((len(items), attempt, tiled))
        wait_at_gate()
        time.sleep(float(os.environ.get("FAULTS_ITEM_SECONDS", "0")) * len(items))
        pictures = [picture(i.prompt.text, i.seed, i.params.height, i.params.width) for i in items]
        for n, i in enumerate(items):
            for fault in faults(i.seed):
                match fault["kind"]:
                    case "oom" if len(items) > fault.get("above", 0) and not (tiled and fault.get("tiles_help", True)):
                        raise FakeOutOfMemory("CUDA out of memory. Tried to allocate 1.00 GiB")
                    case "nan" if attempt < fault.get("good_attempt", 99):
                        return GeneratedBatch(images=BrokenImages("the decoder's output holds NaN or Inf"))
                    case "black" if attempt < fault.get("good_attempt", 99):
                        pictures[n] = np.zeros_like(pictures[n])
                    case "oom" | "nan" | "black":
                        pass
                    case _:
                        misbehave(fault)
        self.items += len(items)
        return GeneratedBatch(images=ReadyImages(np.stack(pictures)), details={"timings": {"total": 0.0}})

    tiles = True

    def useful_batch(self) -> int | None:
        return None

    def free_memory(self) -> bool:
        self.calls.append((0, 0, False))
        return False

    def extend(self, shapes: Sequence[Any], texts: Sequence[Encoding]) -> None:
        for fault in faults("extend"):
            misbehave(fault)

    def report(self) -> dict[str, Any]:
        leak = float(os.environ.get("FAULTS_LEAK_GB", "0"))
        numerics = {"engine": os.environ.get("FAULTS_ENGINE", "faulty")}
        for fault in faults("report"):
            numerics["engine"] = fault["engine"]
        return {
            "phases": {"load": 0.0, "warm_up": 0.0},
            "numerics": numerics,
            "versions": {},
            "gpu_memory": {
                "reserved_gb": leak * self.items,
                "peak_allocated_gb": 0.0,
                "peak_reserved_gb": leak * self.items,
            },
            "pid": os.getpid(),
        }

    def close(self) -> None:
        pass


def faults(on: int | str) -> list[dict[str, Any]]:
    """The faults due now; those with ``times`` are counted in files, across processes."""
    due = []
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if fault["on"] != on:
            continue
        if "times" in fault or "after" in fault:
            counter = Path(os.environ["FAULTS_DIR"]) / f"{fault['kind']}_{on}"
            with open(counter, "ab") as file:
                file.write(b"x")
            if not fault.get("after", 0) < counter.stat().st_size <= fault.get("after", 0) + fault.get("times", 10**9):
                continue
        due.append(fault)
    return due


def misbehave(fault: dict[str, Any]) -> None:
    match fault["kind"]:
        case "raise":
            raise ValueError(fault.get("text", "this item cannot be drawn"))
        case "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "refuse":
            raise UserError("model.path=/nowhere has no model_index.json")
        case "hang":
            time.sleep(3600)
        case "exit":
            os._exit(3)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "numerics":
            pass


def drawn(results: list[BatchResult]) -> dict[int, str | None]:
    """seed -> error, checking the pixels of those without."""
    found = {}
    for result in results:
        pixels = result.images.wait() if result.images else [None] * len(result.items)
        for i, p in zip(result.items, pixels, strict=True):
            assert i.seed not in found
            found[i.seed] = result.error
            assert p is None or np.array_equal(p, picture("a cat", i.seed))
    return found
