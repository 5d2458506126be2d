"""What a measurement ran on: processor, memory, GPU, versions; and the page cache's state."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "hydra-core", "pillow", "numpy",
)  # fmt: skip
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def describe() -> dict[str, Any]:
    """Facts about this machine; no torch is imported."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def is_cuda() -> bool:
    """True when a GPU is visible."""
    return _gpu() is not None


def drop_page_cache() -> bool:
    """Forget all cached file contents; False where this user may not."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def fill_page_cache(folder: Path) -> None:
    """Read every file once, so that later reads come from memory."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass


def matmul_tflops() -> float | None:
    """This GPU's rate of an 8192^3 bf16 product on random data, in a process of its own; None without a GPU."""
    if not is_cuda():
        return None
    code = """
import torch, time
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
for _ in range(5): a @ b
torch.cuda.synchronize()
started = time.perf_counter()
for _ in range(30): a @ b
torch.cuda.synchronize()
print(30 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> dict[str, str] | None:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode:
        return None
    name, memory, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    return {"name": name, "memory": memory, "driver": driver}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
