"""Tensors of safetensors files onto a device, as fast as the machine allows.

Three ways, chosen by what is there (``method="auto"``):
- ``mmap``: the CPU; tensors are views of the mapped file, read when they are touched.
- ``prefetch``: CUDA with safetensors >= 0.9; the library's own reader threads, pinned staging and device memory.
- ``staged``: CUDA otherwise; reader threads, a small ring of pinned buffers, one device buffer a file.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.weights.packed.format import Packing, packing_of
from zimage_runner.weights.safetensors_file import read_header

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

METHODS = ("mmap", "prefetch", "staged")
READER_THREADS = 8


def load_tensors(paths: Sequence[Path], device: str = "cpu", method: str = "auto") -> dict[str, torch.Tensor]:
    """All tensors of the files, by name, in their stored dtype on ``device`` (cpu, cuda or cuda:N).

    They are complete and may be used on any stream when this returns. Packed files (packed.py) are unpacked, whatever
    the method; all files are packed or none is. Raises ValueError for an unknown method or a
    method this device does not have; BadWeightsFile, SafetensorError or OSError for a damaged file.
    """
    packings = [packing for path in paths if (packing := packing_of(read_header(path))) is not None]
    if packings:
        assert len(packings) == len(paths), paths
        return _load_packed(packings, device)
    if method != "auto":
        return _load(paths, device, method)
    method = choose_method(device)
    if method != "prefetch":
        return _load(paths, device, method)
    from safetensors import SafetensorError

    try:
        return _load(paths, device, method)
    except (TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        # A young interface with its own device memory; what fails for another reason fails again below.
        log.warning("safetensors' prefetch failed (%s): loading without it", error)
        return _load(paths, device, "staged")


def _load(paths: Sequence[Path], device: str, method: str) -> dict[str, torch.Tensor]:
    if method not in METHODS or (method == "mmap") != (device == "cpu"):
        raise ValueError(f"method={method!r} does not load to {device}: use auto")
    began = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    if method == "staged":
        from zimage_runner.weights.staged import load_staged

        tensors = load_staged([read_header(path) for path in paths], device, READER_THREADS)
    else:
        load = _load_mapped if method == "mmap" else _load_prefetched
        for path in paths:
            tensors.update(load(path, device))
    nbytes, seconds = sum(tensor.nbytes for tensor in tensors.values()), time.perf_counter() - began
    log.debug("%d tensors, %.2f GB to %s by %s in %.3f s", len(tensors), nbytes / 1e9, device, method, seconds)
    return tensors


def _load_packed(packings: Sequence[Packing], device: str) -> dict[str, torch.Tensor]:
    from zimage_runner.weights.packed.unpack import load_packed

    began = time.perf_counter()
    tensors = load_packed(
        packings, device, READER_THREADS if device != "cpu" else min(READER_THREADS, os.cpu_count() or 1)
    )
    nbytes, seconds = sum(packing.unpacked.size for packing in packings), time.perf_counter() - began
    log.debug("%d packed tensors, %.2f GB to %s in %.3f s", len(tensors), nbytes / 1e9, device, seconds)
    return tensors


def choose_method(device: str) -> str:
    """The fastest way to load to ``device`` with the libraries that are installed."""
    if device == "cpu":
        return "mmap"
    return "prefetch" if has_prefetch() else "staged"


def has_prefetch() -> bool:
    """Whether safetensors can load to CUDA in the background (0.9 and its release candidates)."""
    import safetensors

    numbers = re.findall(r"\d+", importlib.metadata.version("safetensors"))[:2]
    return tuple(map(int, numbers)) >= (0, 9) and hasattr(safetensors.safe_open, "prefetch")


def _load_mapped(path: Path, device: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=device)


def _load_prefetched(path: Path, device: str) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import safe_open

    torch.cuda.init()  # the library looks for the CUDA runtime that torch has loaded
    with (
        safe_open(path, framework="pt") as file,
        file.prefetch(device=_numbered(device), threads=READER_THREADS) as all_,
    ):  # pyright: ignore[reportAttributeAccessIssue]
        return dict(all_)


def _numbered(device: str) -> str:
    """cuda:N: the library does not know "the current device"."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
