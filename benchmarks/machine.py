"""What a measurement ran on: processor, memory, GPU, versions; and the page cache's state."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from zimage_runner.weights.cache import cache_root

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "hydra-core", "pillow", "numpy",
)  # fmt: skip
IMPORTED = (
    "torch", "nvidia", "triton", "diffusers", "transformers", "tokenizers", "safetensors", "hydra", "numpy", "PIL",
)  # fmt: skip
"""Packages whose files the contestants read."""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
READERS, READ_BYTES = 8, 1 << 24


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


def facts(kept: Path | None) -> dict[str, Any]:
    """``describe`` with the matmul rate, which is measured once and kept in that file, whoever asks first."""
    if kept is None:
        return _measured()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{kept}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # scenarios that run side by side
        if not kept.exists():
            kept.write_text(json.dumps(_measured()), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))


def _measured() -> dict[str, Any]:
    return describe() | {"bf16_matmul_tflops": matmul_tflops()}


def is_cuda() -> bool:
    """True when a GPU is visible."""
    return _gpu() is not None


def drop_page_cache() -> bool:
    """Forget all cached file contents; False where this user may not."""
    os.sync()
    try:
        DROP_CACHES.write_text("3", encoding="utf-8")
    except OSError:
        return False
    return True


def fill_page_cache(model: Path, *, libraries: bool = True) -> None:
    """Read once what the contestants read, so that later reads come from memory: model, prepared copies, libraries."""
    folders = [model, cache_root() / "prepared", *(_library_folders() if libraries else [])]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".h"]
    files.sort(key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(_read, files))


def _read(path: Path) -> None:
    with contextlib.suppress(PermissionError), path.open("rb", buffering=0) as file, open(os.devnull, "wb") as nowhere:
        shutil.copyfileobj(file, nowhere, READ_BYTES)


def _library_folders() -> list[Path]:
    specs = [importlib.util.find_spec(name) for name in IMPORTED]
    return [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, encoding="utf-8")
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
        done = subprocess.run(query, capture_output=True, text=True, check=False, encoding="utf-8")
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


def report(result: Mapping[str, Any], output: Path | None) -> None:
    """Print what was measured as JSON, and write it to a file where one is given."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads, as far as clock ticks tell it; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
