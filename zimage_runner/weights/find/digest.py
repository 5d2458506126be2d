"""The identity of a checkpoint's weights, cheap enough to compute at every start.

``sha256`` over, for every file in name order: its relative name and
- configs, scheduler and tokenizer files: all bytes;
- safetensors files: size, the whole header, and ``BLOCKS`` blocks of ``BLOCK`` bytes of the tensors' bytes: the first,
  the last and evenly strided ones between (all bytes where the file is smaller than that).
A full ``sha256`` of 33 GB takes tens of seconds; this reads about 2 MB a file. Another training run, another
quantisation, another merge change nearly every block; one flipped bit between blocks does not show here, which is what
``verify`` is for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.safetensors_file import WeightsFile

BLOCK = 32 * 1024
BLOCKS = 64


def weights_digest(layout: Layout) -> str:
    """sha256 hex of what decides a picture: configs, tokenizer, headers and sampled tensor bytes."""
    weights = [(component, file) for component, files in layout.weights.items() for file in files]
    parts = [(path.relative_to(layout.path).as_posix(), _bytes_digest(path)) for path in layout.config_files]
    # A file that lies elsewhere has no name here: it may be moved and renamed.
    names = [
        f"{component}/" if component in layout.sources else file.path.relative_to(layout.path).as_posix()
        for component, file in weights
    ]
    parts += zip(names, sampled_digests([file for _, file in weights]), strict=True)
    total = hashlib.sha256()
    for name, digest in sorted(parts):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def sampled_digests(files: Sequence[WeightsFile]) -> list[str]:
    """sha256 hex of each file's size, header and sampled blocks; files are read side by side."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(_sampled_digest, files))


def sample_offsets(data_start: int, size: int) -> list[int]:
    """File offsets of the sampled blocks: sorted, without overlap, covering everything when it is small."""
    length = size - data_start
    count = min(BLOCKS, -(-length // BLOCK))
    if count <= 1:
        return [data_start] * count
    if count < BLOCKS:
        return [data_start + i * BLOCK for i in range(count)]
    return [data_start + i * (length - BLOCK) // (count - 1) for i in range(count)]


def _sampled_digest(file: WeightsFile) -> str:
    total = hashlib.sha256(str(file.size).encode())
    with file.path.open("rb", buffering=0) as handle:
        total.update(os.pread(handle.fileno(), file.data_start, 0))
        for offset in sample_offsets(file.data_start, file.size):
            total.update(os.pread(handle.fileno(), BLOCK, offset))
    return total.hexdigest()


def _bytes_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
