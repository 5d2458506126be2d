"""Writing a packed component (see packed.py): no more than a few frames are in memory at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.weights.io import Threads, write_exactly
from zimage_runner.weights.packed import format as packed
from zimage_runner.weights.packed.format import TENSOR, Counts, aligned, metadata_of
from zimage_runner.weights.prepared.pieces import Piece, PlannedTensor, cut, pieces, places_of, read_piece
from zimage_runner.weights.safetensors_file import header_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Packed = tuple["NDArray[np.uint8]", Counts | None]


def write_packed(path: Path, plan: list[PlannedTensor], threads: int, advance: Callable[[int], object]) -> None:
    """Write the planned tensors as a packed file. ``advance`` is told how many bytes of weights are done."""
    nbytes = sum(tensor.nbytes for tensor in plan)
    most = packed.FRAME_VALUES
    # The header tells what is known only when all is packed; its size is not more than this.
    size = len(_header(plan, [(most, most, most)] * -(-nbytes // (2 * most)), 4 * nbytes))
    counts: list[Counts | None] = []
    place = size
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with contextlib.closing(_packed_frames(plan, threads)) as frames:  # an interruption ends its threads at once
            for frame, (data, count) in frames:
                counts.append(count)
                write_exactly(handle, place, data.data)
                place += aligned(len(data))
                advance(sum(piece.nbytes for piece in frame))
        os.ftruncate(handle, place)
        write_exactly(handle, 0, memoryview(_header(plan, counts, place - size, size)))
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(plan: list[PlannedTensor], counts: list[Counts | None], stored: int, size: int | None = None) -> bytes:
    places = places_of(plan)
    tensors = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [places[tensor.name], places[tensor.name] + tensor.nbytes],
        }
        for tensor in plan
    }
    return header_bytes({TENSOR: ("U8", (stored,))}, metadata_of(tensors, packed.FRAME_VALUES, counts), size)


def _packed_frames(plan: list[PlannedTensor], threads: int) -> Generator[tuple[list[Piece], Packed], None, None]:
    """(what a frame holds, its packed bytes), in order; a few more than are worked on are ready."""
    nbytes = 2 * packed.FRAME_VALUES
    frames = itertools.groupby(cut(pieces(plan, places_of(plan)), nbytes), lambda piece: piece.offset // nbytes)
    waiting: deque[tuple[list[Piece], Future[Packed]]] = deque()
    with Threads(threads) as pool:
        for _, group in frames:
            frame = list(group)
            waiting.append((frame, pool.submit(_pack, frame, pool)))
            if len(waiting) > threads + 2:
                first, result = waiting.popleft()
                yield first, result.result()
        for frame, result in waiting:
            yield frame, result.result()


def _pack(frame: list[Piece], pool: Threads) -> Packed:
    import numpy as np

    from zimage_runner.weights.packed.pack import pack_frame

    data = np.empty(sum(piece.nbytes for piece in frame), np.uint8)
    done = 0
    for piece in frame:
        pool.check()
        data[done : done + piece.nbytes] = read_piece(piece).numpy()
        done += piece.nbytes
    values = data.view(np.uint16)
    if all(piece.stored != "BF16" for piece in frame):
        return data, None
    return pack_frame(values)
