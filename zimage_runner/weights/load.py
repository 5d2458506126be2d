"""Tensors of safetensors files onto a device, as fast as the machine allows.

Three ways, chosen by what is there (``method="auto"``):
- ``mmap``: the CPU; tensors are views of the mapped file, read when they are touched.
- ``prefetch``: CUDA with safetensors >= 0.9; the library's own reader threads, pinned staging and device memory.
- ``staged``: CUDA otherwise; reader threads, a small ring of pinned buffers, one device buffer a file. Pinning memory
  costs 0.6 s a GiB and copying from pageable memory runs at a seventh of the bus's speed: so a few pinned buffers are
  filled again and again while earlier ones are on their way. The tensors are views of the file's buffer.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from zimage_runner.weights.io import read_exactly, run_threads
from zimage_runner.weights.packed.format import Packing, packing_of
from zimage_runner.weights.safetensors_file import WeightsFile, read_header

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

METHODS = ("mmap", "prefetch", "staged")
READER_THREADS = 8
PIECE = 8 * 1024 * 1024
BUFFERS = 2
"""Pinned buffers of each thread: one is filled while the other is copied."""
ALIGNMENT = 16
"""Bytes: vectorised kernels and cuBLAS want tensors to begin at a multiple of it."""
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""torch's name of each safetensors dtype."""


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
        import torch

        with torch.inference_mode(False):  # threads fill the memory, and they are not in the caller's inference mode
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


@dataclass(frozen=True, slots=True)
class _Piece:
    handle: int
    path: Path
    offset: int
    target: torch.Tensor
    """uint8 view of the device buffer, as long as the piece."""


def load_staged(files: Sequence[WeightsFile], device: str, threads: int) -> dict[str, torch.Tensor]:
    """All tensors of the files on a CUDA device; complete when this returns."""
    import torch

    handles = [os.open(file.path, os.O_RDONLY) for file in files]
    try:
        buffers = [torch.empty(file.size - file.data_start, dtype=torch.uint8, device=device) for file in files]
        work: SimpleQueue[_Piece] = SimpleQueue()
        for file, handle, buffer in zip(files, handles, buffers, strict=True):
            for begin in range(0, len(buffer), PIECE):
                work.put(_Piece(handle, file.path, file.data_start + begin, buffer[begin : begin + PIECE]))
        _run_readers(work, device, threads)
    finally:
        for handle in handles:
            os.close(handle)
    return {
        name: view for file, buffer in zip(files, buffers, strict=True) for name, view in tensor_views(file, buffer)
    }


def _run_readers(work: SimpleQueue[_Piece], device: str, threads: int) -> None:
    import torch

    errors: list[BaseException] = []
    # The buffers' memory may have been in use on the caller's stream until just now.
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))

    def read() -> None:
        try:
            _reader(work, device, ready, errors)
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    run_threads([threading.Thread(target=read, name="load-weights") for _ in range(threads)], errors)
    if errors:
        raise errors[0]


def _reader(work: SimpleQueue[_Piece], device: str, ready: torch.cuda.Event, errors: list[BaseException]) -> None:
    import torch

    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    ring: list[tuple[torch.Tensor, Any, torch.cuda.Event]] = []
    for _ in range(BUFFERS):
        pinned = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        ring.append((pinned, pinned.numpy().data, torch.cuda.Event()))
    turn = 0
    while not errors:
        try:
            piece = work.get_nowait()
        except Empty:
            break
        pinned, memory, copied = ring[turn % BUFFERS]
        turn += 1
        copied.synchronize()  # at once for an event that was never recorded
        size = len(piece.target)
        read_exactly(piece.handle, piece.offset, memory[:size], piece.path)
        with torch.cuda.stream(stream):
            piece.target.copy_(pinned[:size], non_blocking=True)
            copied.record(stream)
    stream.synchronize()


def tensor_views(file: WeightsFile, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    import torch

    views = []
    for name, info in file.tensors.items():
        begin = info.start - file.data_start
        piece = buffer[begin : begin + info.nbytes]
        if begin % ALIGNMENT:  # only in files that were not prepared, whose tensors are packed whatever their size
            piece = piece.clone()
        views.append((name, piece.view(getattr(torch, TORCH_DTYPES[info.dtype])).reshape(info.shape)))
    return views
