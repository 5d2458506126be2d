"""Opening a weights file by its header alone: safetensors or GGUF, and one clear line for everything else."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage_runner.errors import UserError, one_line
from zimage_runner.weights.formats.gguf_header import read_gguf_header
from zimage_runner.weights.safetensors_file import MAX_HEADER, BadWeightsFile, TensorInfo, read_header

MAX_TENSORS = 100_000
"""Z-Image with its text encoder and quantisation scales has about 3,000."""
_HEAD = 4096
LFS_POINTER = b"version https://git-lfs"
_SIGNS = (
    (LFS_POINTER, "is a Git LFS pointer, not the file itself: run 'git lfs pull' where it was cloned"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it and give the .safetensors or .gguf file"),
    (b"Rar!", "is a RAR archive: unpack it and give the .safetensors or .gguf file"),
    (b"\x1f\x8b", "is a gzip archive: unpack it and give the .safetensors or .gguf file"),
    (b"\x89PNG", "is a picture: give a .safetensors or .gguf file"),
    (b"\xff\xd8\xff", "is a picture: give a .safetensors or .gguf file"),
    (b"FUGG", "is a big-endian GGUF file, which is not supported"),
)
_PICKLE = "is a pickle checkpoint, which can run code and is never loaded: get or convert it to .safetensors"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file's header: what it holds and where, under its own names."""

    path: Path
    size: int
    kind: str
    """safetensors or gguf."""
    tensors: dict[str, TensorInfo]
    """dtypes as safetensors names them (BF16) or as GGUF does (Q4_K); shapes with the rows first."""
    metadata: Mapping[str, object]
    """Texts of a safetensors header; numbers, texts and lists of numbers of a GGUF header."""


def open_stored(path: Path, label: str = "") -> StoredFile:
    """Read a file's header. Raises UserError, one line, for what is no whole weights file.

    ``label`` names the file in messages where the path alone does not, such as ``model.path=x.safetensors``.
    """
    label = label or str(path)
    try:
        head = _head(path)
        if head[:4] == b"GGUF":
            stored = StoredFile(path, path.stat().st_size, "gguf", *read_gguf_header(path))
        elif (wrong := what_else(head)) is not None:
            raise BadWeightsFile(wrong)
        else:
            file = read_header(path)
            stored = StoredFile(path, file.size, "safetensors", file.tensors, file.metadata)
        if len(stored.tensors) > MAX_TENSORS:
            raise BadWeightsFile(f"holds {len(stored.tensors)} tensors, which is absurd: not a file of Z-Image")
    except BadWeightsFile as error:
        text = one_line(str(error), 300)
        verb = "" if text.startswith(("is ", "holds ", "has ")) else "is "
        raise UserError(f"{label} {verb}{text}") from error
    except OSError as error:
        raise UserError(f"{label} cannot be read: {error.strerror or error}") from error
    return stored


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; a pipe or a device is never opened, since it may not answer."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise BadWeightsFile("is a directory: give a .safetensors or .gguf file")
    if not stat.S_ISREG(mode):
        raise BadWeightsFile("is not a regular file: give a .safetensors or .gguf file")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise BadWeightsFile("is empty (0 bytes): download it again")
    return head


def what_else(head: bytes) -> str | None:
    """What a file is that is neither safetensors nor GGUF, and the remedy; None where it may be safetensors."""
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER:
        return None
    for sign, text in _SIGNS:
        if head.startswith(sign):
            return text
    if head.startswith(b"PK\x03\x04"):
        is_torch = b"data.pkl" in head or b".data/serialization" in head
        return _PICKLE if is_torch else "is a zip archive: unpack it and give the .safetensors or .gguf file"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return _PICKLE
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: the download needed a login or the address was wrong"
    if text.startswith((b"{", b"[")):
        return "is JSON text, not weights: give the .safetensors or .gguf file beside it"
    return None
