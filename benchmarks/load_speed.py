"""Time the ways of loading a checkpoint's weights, and the start of a process. Prints one JSON object.

    python benchmarks/load_speed.py DIRECTORY                      # files in the page cache
    python benchmarks/load_speed.py DIRECTORY --dropped            # also from the disk
    python benchmarks/load_speed.py DIRECTORY --methods staged library --repeats 3 --no-startup

DIRECTORY is a diffusers-format or a prepared checkpoint. With 20 GB on one GPU the default takes well under a minute.
Every method's tensors are compared with the file's bytes before its time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zimage_runner.weights.load import METHODS, BackgroundLoad, choose_method, has_prefetch, load_tensors
from zimage_runner.weights.names import COMPONENTS
from zimage_runner.weights.prefetch import read_ahead

ROOT = Path(__file__).resolve().parent.parent


def component_files(directory: Path) -> dict[str, list[Path]]:
    """Safetensors files of each component, in use order."""
    return {name: sorted((directory / name).glob("*.safetensors")) for name in COMPONENTS}


def drop_from_page_cache(paths: list[Path]) -> None:
    """Forget the files' clean pages; needs no rights, unlike /proc/sys/vm/drop_caches."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_method(paths: list[Path], device: str, method: str) -> tuple[float, dict[str, Any]]:
    import torch

    began = time.perf_counter()
    tensors = load_tensors(paths, device, method)
    if device != "cpu":
        torch.cuda.synchronize()
    else:
        for tensor in tensors.values():  # mapped pages are read when they are touched
            tensor.view(-1).view(torch.uint8)[::4096].sum()
    return time.perf_counter() - began, tensors


def is_equal(paths: list[Path], tensors: dict[str, Any]) -> bool:
    """Every 7th tensor of each file, and the first and last, bit by bit against the CPU's view of the file."""
    import torch

    for path in paths:
        stored = load_tensors([path])
        names = list(stored)
        for name in {*names[::7], names[-1]}:
            expected = stored[name].reshape(-1).view(torch.uint8)
            if not torch.equal(expected, tensors[name].cpu().reshape(-1).view(torch.uint8)):
                return False
    return True


def measure(components: dict[str, list[Path]], device: str, methods: list[str], repeats: int) -> dict[str, Any]:
    import torch

    paths = [path for files in components.values() for path in files]
    nbytes = sum(path.stat().st_size for path in paths)
    reader = read_ahead(paths)
    if reader:
        reader.wait()
    results: dict[str, Any] = {}
    for method in methods:
        seconds = []
        equal = True
        for repeat in range(repeats):
            took, tensors = time_method(paths, device, method)
            seconds.append(round(took, 3))
            equal = equal and (repeat > 0 or is_equal(paths, tensors))
            del tensors
            if device != "cpu":
                torch.cuda.empty_cache()
        best = min(seconds)
        results[method] = {"seconds": seconds, "gb_per_s": round(nbytes / best / 1e9, 1), "equal": equal}
    background = BackgroundLoad(components, device)
    for name in components:
        background.wait(name)
    results["background"] = {name: round(s, 3) for name, s in background.seconds.items()}
    return results


def measure_dropped(components: dict[str, list[Path]], device: str) -> dict[str, Any]:
    """The chosen method from the disk: alone, and with the reader threads a head start of nothing."""
    paths = [path for files in components.values() for path in files]
    method = choose_method(device)
    results: dict[str, Any] = {}
    for name in ("alone", "with read_ahead"):
        drop_from_page_cache(paths)
        reader = read_ahead(paths) if name != "alone" else None
        took, tensors = time_method(paths, device, method)
        if reader:
            reader.stop()
        del tensors
        results[f"{method} {name}"] = round(took, 3)
    return results


STARTUP = {
    "import torch, then context": "import torch; torch.cuda.init(); torch.zeros(1, device='cuda').item()",
    "context while importing torch": (
        "from zimage_runner.weights.prefetch import CudaContext; context = CudaContext(); import torch\n"
        "torch.cuda.init(); torch.zeros(1, device='cuda').item(); assert context.wait(), context.error"
    ),
}


def measure_startup(repeats: int) -> dict[str, float]:
    """Median seconds of fresh processes from start to the first result of the GPU."""
    results = {}
    for name, code in STARTUP.items():
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            seconds.append(time.perf_counter() - began)
        results[name] = round(statistics.median(seconds), 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", help="default cuda where there is a GPU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that this machine has")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dropped", action="store_true", help="also with the files dropped from the page cache")
    parser.add_argument("--no-startup", action="store_true", help="leave out the start of a process")
    args = parser.parse_args()
    import safetensors
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = ["mmap"] if device == "cpu" else [*(["prefetch"] if has_prefetch() else []), "staged", "library"]
    components = component_files(args.directory)
    report: dict[str, Any] = {
        "directory": str(args.directory),
        "gigabytes": round(sum(p.stat().st_size for files in components.values() for p in files) / 1e9, 2),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
        "cached": measure(components, device, args.methods or available, args.repeats),
    }
    if args.dropped:
        report["dropped"] = measure_dropped(components, device)
    if device != "cpu" and not args.no_startup:
        report["startup"] = measure_startup(3)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
