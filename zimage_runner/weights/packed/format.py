"""Packed weights files: bfloat16 in about two thirds of its bytes, bit for bit the same once unpacked. No torch here.

Sign and mantissa of a weight are noise, but its exponent is one of very few. For normally distributed weights it holds
2.55 bits of information; this format stores it in 2.64 to 2.75 bits and everything in 66.7 to 67.4 % of the bytes.

A packed file is a safetensors file of one U8 tensor, ``packed``. ``__metadata__["packing"]`` is JSON: ``version``;
``frame_values``; ``frames``, the counts [m2, m3, m4] of each frame, or null; ``tensors``, what the header of the
unpacked file would say. That file's data, 16-bit values v, is cut into frames of ``frame_values`` (the last may be
shorter); each begins at the next multiple of 4096 bytes of ``packed``. A frame of n values is stored as it is (null)
where packing gains nothing, else in sections without gaps:

======================  =====================================================================================
``16 * ceil(n / 4096)``  table: for each block of 4096 values four little-endian uint32: its ``top``, and how many
                         codes of level 2, codes of level 3 and distances the blocks before it have
``n``                    a byte for each value, its sign and mantissa: v >> 8 & 0x80 | v & 0x7f
``ceil(n / 4)``          level 1: a code for each value
``ceil(m2 / 4)``         level 2: a code for each code 3 of level 1
``ceil(m3 / 4)``         level 3: a code for each code 3 of level 2
``m4``                   distances: a byte for each code 3 of level 3
======================  =====================================================================================

Codes are of 2 bits, four to a byte, the first in the lowest bits. They tell the distance of a value's exponent from its
block's top, (top - (v >> 7)) & 0xff: in level 1 codes 0, 1, 2 say 1, 2, 3; in level 2 they say 0, 4, 5; in level 3 they
say 6, 7, 8; code 3 always says that it is told further on. Every block can be unpacked by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_runner.weights.safetensors_file import BadWeightsFile, WeightsFile, end_of, parse_tensors

VERSION = 1
TENSOR = "packed"
METADATA = "packing"
BLOCK = 4096
"""Values that share a top."""
FRAME_VALUES = 8 << 20
"""Values of a frame at most: 16 MiB of weights, what preloading reads at a time."""
ALIGNMENT = 4096
"""Bytes: frames begin at multiples of it."""

DTYPES = ("BF16", "F8_E4M3", "I8", "F32")
"""Of the tensors in a packed file. Only the first gains from packing: frames of the others are stored as they are."""

Counts = tuple[int, int, int]
"""Codes of level 2, codes of level 3 and distances of a frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A stretch of the weights and where it lies in the packed file."""

    offset: int
    """First byte in the file."""
    nbytes: int
    """Bytes in the file."""
    start: int
    """First byte of the unpacked data."""
    values: int
    counts: Counts | None
    """None: stored as it is."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a packed file is to be unpacked."""

    unpacked: WeightsFile
    """The file as it would be if it were not packed and had no header: ``data_start`` 0, ``size`` its data's."""
    frames: tuple[Frame, ...]
    frame_bytes: int
    """Unpacked, of each frame but the last."""

    @property
    def largest_frame(self) -> int:
        """Bytes, in the file."""
        return max((frame.nbytes for frame in self.frames), default=0)


def frame_bytes(values: int, counts: Counts | None) -> int:
    """Size of a frame in the file."""
    if counts is None:
        return 2 * values
    codes2, codes3, distances = counts
    levels = sum(-(-codes // 4) for codes in (values, codes2, codes3))
    return 16 * -(-values // BLOCK) + values + levels + distances


def place_frames(nbytes: int, frame_values: int, counts: Sequence[Counts | None], begin: int) -> list[Frame]:
    """The frames of ``nbytes`` of weights, in a file whose tensor begins at ``begin``."""
    frames, offset = [], 0
    for number, count in enumerate(counts):
        start = 2 * frame_values * number
        values = min(frame_values, (nbytes - start) // 2)
        frames.append(Frame(begin + offset, frame_bytes(values, count), start, values, count))
        offset += aligned(frames[-1].nbytes)
    return frames


def aligned(nbytes: int) -> int:
    """``nbytes`` and the padding up to where the next frame may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def metadata_of(tensors: Mapping[str, Any], frame_values: int, counts: Sequence[Counts | None]) -> dict[str, str]:
    """``__metadata__`` of a packed file; ``tensors``: what the header of the unpacked file would say."""
    packing = {"version": VERSION, "frame_values": frame_values, "frames": counts, "tensors": tensors}
    return {"format": "pt", METADATA: json.dumps(packing, separators=(",", ":"))}


def packing_of(file: WeightsFile) -> Packing | None:
    """How to unpack ``file``; None for one that is not packed.

    Everything that says how much is read and written is checked here. Raises BadWeightsFile.
    """
    text = file.metadata.get(METADATA)
    if text is None:
        return None
    try:
        return _parse(file, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeightsFile(f"{file.path.name}: its packing cannot be read ({error})") from error


def _parse(file: WeightsFile, packing: dict[str, Any]) -> Packing:
    if packing["version"] != VERSION:
        raise ValueError(f"version {packing['version']}, not {VERSION}")
    tensors = parse_tensors(packing["tensors"], 0)
    if any(info.dtype not in DTYPES or info.nbytes % 2 for info in tensors.values()):
        raise ValueError(f"tensors that are not of {', '.join(DTYPES)}, or of odd sizes")
    nbytes, frame_values = end_of(tensors, 0), packing["frame_values"]
    if type(frame_values) is not int or not 0 < frame_values <= FRAME_VALUES or frame_values % BLOCK:
        raise ValueError(f"frames of {frame_values} values")
    counts = [None if count is None else tuple(count) for count in packing["frames"]]
    if len(counts) != -(-nbytes // (2 * frame_values)):
        raise ValueError(f"{len(counts)} frames of {frame_values} values for {nbytes} bytes")
    stored = file.tensors.get(TENSOR)
    if stored is None or len(file.tensors) != 1 or stored.dtype != "U8":
        raise ValueError(f"not one U8 tensor {TENSOR!r}")
    frames = place_frames(nbytes, frame_values, counts, stored.start)
    for number, frame in enumerate(frames):
        if not _is_possible(frame):
            raise ValueError(f"frame {number} of {frame.values} values with counts {frame.counts}")
    if sum(aligned(frame.nbytes) for frame in frames) != stored.nbytes:
        raise ValueError(f"its frames are not the {stored.nbytes} bytes of the file")
    return Packing(WeightsFile(file.path, nbytes, 0, tensors), tuple(frames), 2 * frame_values)


def _is_possible(frame: Frame) -> bool:
    if frame.counts is None:
        return True
    if not all(type(count) is int for count in frame.counts):
        return False
    codes2, codes3, distances = frame.counts
    return 0 <= distances <= codes3 <= codes2 <= frame.values and frame.nbytes < 2 * frame.values
