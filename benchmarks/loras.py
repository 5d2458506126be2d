"""What adapters cost: reading and checking them, changing from one to another, and a picture with one beside without.

    python -m benchmarks.loras [--rank 32] [--switches 5] [--pictures 6] [--output FILE] [overrides ...]
    python -m benchmarks.loras model=local model.path=/data/turbo engine.precision=fp8

Two LoRAs of the given rank are written, of every product of the transformer's blocks (attention, feed-forward, adaLN),
with random factors. The session is warm; the device has finished before each clock is read. Pictures with and without
take turns. The picture without adapters must be the same, to the last bit, before all that and after it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.variants import composed

PREDICTION = (
    "Expected on an H200, Z-Image-Turbo, rank 32 on every product of the blocks: originals stay on the GPU, so that a "
    "change reads and writes 12 GB of weights some ten times over in float32, 0.05 s, and copies 0.3 GB of factors, "
    "0.05 s: 0.1 s a change, below the 0.3 s that are allowed. The first change copies the originals, 0.05 s more; "
    "with fp8 it reads 12 GB of bf16 weights from the page cache, 3 s. A picture takes as long with as without."
)
CHANGED = ("attention.to_", "feed_forward.w", "adaLN_modulation.")


def main() -> int:
    parser = argparse.ArgumentParser(description="adapters: switching, and pictures with and without")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--switches", type=int, default=5, help="changes from one adapter to another and back")
    parser.add_argument("--pictures", type=int, default=6, help="pictures with and as many without")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("overrides", nargs="*")
    args, command = parser.parse_args(), " ".join(sys.argv[1:])
    from zimage_runner.engines.threads import wait_passively

    wait_passively()  # as a session does, before torch is there
    with tempfile.TemporaryDirectory(prefix="bench_loras_") as folder:
        result = measure(Path(folder), args.rank, args.switches, args.pictures, args.overrides)
    machine.report({"prediction": PREDICTION, "command": command, **result}, args.output)
    return 0 if result["undone_exactly"] else 1


def measure(folder: Path, rank: int, switches: int, pictures: int, overrides: list[str]) -> dict[str, Any]:
    """Do everything. The seconds of each part, as plain data."""
    from zimage_runner.runner.spec import plan_run
    from zimage_runner.session import Session
    from zimage_runner.weights.adapters.find import read_checked

    words = ["prompt=a red apple", "seeds=[7]", "warmup=generate", *overrides]
    plain = plan_run(composed(*words))
    files = [write_lora(folder / f"{name}.safetensors", plain.checkpoint.path, rank, seed)
             for seed, name in enumerate("ab")]  # fmt: skip
    checking = [seconds_of(lambda: read_checked(files[0], "benchmark")) for _ in range(2)]
    adapted = plan_run(composed(*words, f"loras=[{files[0]}]"))
    a = adapted.plan.items[0].params.loras
    b = plan_run(composed(*words, f"loras=[{files[1]}]")).plan.items[0].params.loras
    session = Session(plain.session, plain.shapes, plain.texts)
    session.start()
    try:
        without, with_a = [plain.plan.items[0]], [adapted.plan.items[0]]
        before = session.generate(without).images.wait().tobytes()
        found = switch(session.engine, a, b, switches)
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(pictures + 1):
            for name, items in (("with", with_a), ("without", without)):
                session.engine.adapt(items[0].params.loras)  # not in the picture's time
                seconds[name].append(timed(session.engine, lambda items=items: session.generate(items).images.wait()))
        after = session.generate(without).images.wait().tobytes()
        report = session.report()
    finally:
        session.close()
    pairs = list(zip(seconds["with"][1:], seconds["without"][1:], strict=True))
    return {
        "rank": rank,
        "file_mb": round(files[0].stat().st_size / 1e6, 1),
        "check_seconds": {"first": checking[0], "again": checking[1]},
        "switch_seconds": found,
        "picture_seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "picture_ratio": statistics.median(with_ / without for with_, without in pairs),
        "undone_exactly": before == after,
        **{name: report[name] for name in ("device_name", "numerics", "gpu_memory", "peak_host_gb")},
    }


def write_lora(path: Path, checkpoint: Path, rank: int, seed: int) -> Path:
    """A LoRA in bfloat16 of every product of the transformer's blocks, in ai-toolkit's layout."""
    import torch
    from safetensors.torch import save_file

    from zimage_runner.weights.adapters.find import component_shapes

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in component_shapes(checkpoint, "transformer").items():
        if len(shape) == 2 and any(f".{part}" in name for part in CHANGED):
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            down = torch.randn(rank, shape[1], generator=generator) / math.sqrt(shape[1])
            tensors[f"{module}.lora_A.weight"] = down.bfloat16()
            tensors[f"{module}.lora_B.weight"] = (torch.randn(shape[0], rank, generator=generator) * 0.01).bfloat16()
    save_file(tensors, path)
    return path


def switch(engine: Any, a: Any, b: Any, switches: int) -> dict[str, float]:
    """Seconds of changes: the first ones, from one adapter to another, to none and back."""

    def adapt(loras: Any) -> float:
        return timed(engine, lambda: engine.adapt(loras))

    first, other = adapt(a), adapt(b)
    between = [adapt(loras) for _ in range(switches) for loras in (a, b)]
    ends = [(adapt(()), adapt(b)) for _ in range(switches)]
    return {
        "first_use": first,
        "first_use_of_a_second": other,
        "from_one_to_another": statistics.median(between),
        "slowest": max(between),
        "to_none": statistics.median(end for end, _ in ends),
        "from_none": statistics.median(begin for _, begin in ends),
    }


def timed(engine: Any, work: Callable[[], Any]) -> float:
    """Seconds of some work, the device's included."""

    def finished() -> None:
        work()
        engine.synchronize()

    engine.synchronize()
    return seconds_of(finished)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
