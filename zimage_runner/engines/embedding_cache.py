"""Caption features kept on disk, so that a prompt is encoded once and not once a run.

An entry's name is the sha256 of everything that decides it: text, max_sequence_length, weights, adapters that change
the text encoder, numerics and library versions. A run whose captions are all here does not load the text encoder
(``all_cached`` tells before anything is).

The directory is the user's, who may keep other things in it: the cache lives in a folder of its own there, marked by a
CACHEDIR.TAG, and counts and deletes nothing but plain files of its own names in it. Links are not followed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner import GB
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.parsed import from_json
from zimage_runner.sampling import Lora

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Caption = tuple[str, int, *tuple[Lora, ...]]
"""A text, its max_sequence_length, and the adapters that change the text encoder."""
FORMAT = 2
TENSOR = "prompt_embeds"
FOLDER = "zimage_runner_captions"
"""The cache's own folder below ``embedding_cache.path``."""
MARKER = "CACHEDIR.TAG"
SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n"
"""By which backup tools know a cache (https://bford.info/cachedir/)."""
MARKER_TEXT = SIGNATURE + b"# Caption features kept by zimage_runner, which may delete them at any time.\n"
IDENTITIES = "identities"
"""Folder of what numerics and versions came of a configuration last, by the configuration's digest."""
FILL_AFTER_EVICTION = 0.9
"""Evicting a tenth at a time keeps the directory from being listed for each new entry."""
LARGEST_ENTRY = 1 << 30
"""Bytes; what is larger was not written here and is not read into memory."""
_SHARD = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.(safetensors|[0-9a-f]{8}\.tmp)")
"""Entries, and what killed processes left of them."""


@dataclass(kw_only=True, slots=True)
class EmbeddingCacheConfig:
    """The ``embedding_cache`` fields."""

    path: str | None = None
    """Directory of the cache, which has a folder of its own in it and may be shared by any number of runs; null keeps
    caption features in memory alone."""
    max_gb: float = 10.0
    """Size limit in GB (1e9 bytes); what was used longest ago goes first."""

    def __post_init__(self) -> None:
        if not 0 < self.max_gb < 1e6:
            raise UserError(f"embedding_cache.max_gb={self.max_gb} is out of range: use more than 0")
        if self.path is not None and not self.path.strip():
            raise UserError("embedding_cache.path='' is empty: name a directory, or null for none")


class EmbeddingCache:
    """Files of one tensor each, in 256 folders. Several processes may use one directory at a time."""

    def __init__(self, config: EmbeddingCacheConfig, identity: Mapping[str, Any], asked: str) -> None:
        """``identity``: weights digest, numerics and versions; ``asked``: the configuration that they came of.

        Raises UserError if the directory cannot be made.
        """
        self._folder = _folder(config)
        self._limit = config.max_gb * GB
        self._identity = json.dumps({"format": FORMAT, **identity}, sort_keys=True, default=str)
        try:
            self._fd = _open_own_folder(self._folder)
            weakref.finalize(self, os.close, self._fd)
            _remember(self._fd, asked, self._identity)
        except OSError as error:
            raise UserError(f"embedding_cache.path={config.path} cannot be made: {error.strerror}") from None
        self._size = sum(size for _, size, _ in self._entries())

    def get(self, caption: Caption, device: str) -> torch.Tensor | None:
        """The features [L, cap_feat_dim] on ``device``, or None. A damaged entry is removed and counts as missing."""
        name = self._name(caption)
        try:
            with os.fdopen(beneath.open_file(self._fd, name), "rb") as file:
                data = file.read(LARGEST_ENTRY + 1)
                with contextlib.suppress(OSError):  # a cache of somebody else's that this one may only read
                    os.utime(file.fileno())
            return _unpacked(data, name).to(device)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is damaged and encoded again: %s", self._folder / name, error)
            self._remove(name)
            return None

    def put(self, caption: Caption, embeds: torch.Tensor) -> None:
        """Keep the features. A disk that takes no more is told once a call and costs nothing else."""
        name = self._name(caption)
        data = _packed(embeds, name)
        try:
            beneath.make_dirs(self._fd, name[:2])
            _write(self._fd, name, data)
        except OSError as error:
            log.warning("embedding_cache.path=%s: cannot write (%s)", self._folder.parent, error.strerror)
            return
        self._size += len(data)
        if self._size > self._limit:
            self._evict(newest=name)

    def _name(self, caption: Caption) -> str:
        return _name(self._identity, caption)

    def _entries(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, name) of every entry; leftovers of killed processes are among them."""
        found = []
        for shard in os.listdir(self._fd):
            if not _SHARD.fullmatch(shard):
                continue
            try:
                with atomic.directory(shard, self._fd) as folder, os.scandir(folder) as files:
                    for file in files:
                        status = _own_status(file, shard)
                        if status is not None:
                            found.append((status.st_mtime, status.st_size, f"{shard}/{file.name}"))
            except OSError:  # a link or a file of somebody else's, or another process evicts too
                continue
        return found

    def _evict(self, newest: str) -> None:
        """Delete what was used longest ago; ``newest`` last, since files of the same few milliseconds share a time."""
        entries = sorted(self._entries(), key=lambda entry: (entry[2] == newest, entry))
        self._size = sum(size for _, size, _ in entries)
        for _, size, name in entries:
            if self._size <= FILL_AFTER_EVICTION * self._limit:
                break
            self._remove(name)
            self._size -= size

    def _remove(self, name: str) -> None:
        """Delete an entry, if a plain file has its name."""
        with contextlib.suppress(OSError), beneath.parent(self._fd, name) as (folder, file):
            if beneath.unfit_target(file, folder) is None:
                os.unlink(file, dir_fd=folder)


def _own_status(file: os.DirEntry[str], shard: str) -> os.stat_result | None:
    """The status of a plain file that has the name of an entry of this folder; None for anything else."""
    if not (_ENTRY.fullmatch(file.name) and file.name.startswith(shard)):
        return None
    try:
        status = file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _open_own_folder(folder: Path) -> int:
    """A descriptor of the cache's folder, which is made and marked if need be. Raises OSError.

    A folder of that name which holds other things and no mark is somebody else's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.directory(folder.parent) as parent:
        beneath.make_dirs(parent, folder.name)
        fd = beneath.open_dir(parent, folder.name)
    try:
        if _read(fd, MARKER).startswith(SIGNATURE):
            return fd
        if any(not name.startswith(MARKER) for name in os.listdir(fd)):
            raise OSError(errno.EEXIST, f"{folder} holds other things and no {MARKER}: name another directory")
        _write(fd, MARKER, MARKER_TEXT)
        return fd
    except BaseException:
        os.close(fd)
        raise


def _read(fd: int, name: str) -> bytes:
    """A small file of the cache's; empty where there is none. Raises OSError."""
    try:
        with os.fdopen(beneath.open_file(fd, name), "rb") as file:
            return file.read(1 << 20)
    except FileNotFoundError:
        return b""


def _write(fd: int, name: str, data: bytes) -> None:
    """Write a file of the cache's, whole or not at all; several processes may write the same one at a time."""
    stem = name.removesuffix(".safetensors")
    temporary = f"{stem}.{secrets.token_hex(4)}.tmp"
    with beneath.parent(fd, name) as (folder, base):
        atomic.write_as(folder, base, temporary.rpartition("/")[2], data)


def _packed(embeds: torch.Tensor, name: str) -> bytes:
    """A file that says by its checksum which entry it is and that it is whole."""
    from safetensors.torch import save

    tensor = embeds.detach().cpu().contiguous()
    return save({TENSOR: tensor}, {"format": str(FORMAT), "sha256": _checksum(tensor, name)})


def _unpacked(data: bytes, name: str) -> torch.Tensor:
    """The tensor of ``_packed``. Raises ValueError unless it is the one that was written under this name."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if len(data) > LARGEST_ENTRY:
        raise ValueError("it is too large for an entry")
    try:
        tensor = load(data)[TENSOR]
        header = from_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        checksum = header["__metadata__"]["sha256"]
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if checksum != _checksum(tensor, name):
        raise ValueError("its checksum does not match")
    return tensor


def _checksum(tensor: torch.Tensor, name: str) -> str:
    """sha256 of the entry's name and of the tensor's type, shape and bytes."""
    import torch

    total = hashlib.sha256(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def all_cached(config: EmbeddingCacheConfig, asked: str, captions: Iterable[Caption]) -> bool:
    """Whether each caption's features are there, if numerics and versions are those that ``asked`` gave last.

    A guess, made before torch is imported: who relies on it must still be able to encode.
    """
    if config.path is None:
        return False
    folder = _folder(config)
    try:
        with atomic.directory(folder.parent) as parent, atomic.directory(folder.name, parent) as fd:
            identity, status = _remembered(fd, asked), beneath.Statuses(fd)
            if identity is None:
                return False
            for caption in captions:
                status(_name(identity, caption))
    except OSError:
        return False
    return True


def _remember(fd: int, asked: str, identity: str) -> None:
    if _remembered(fd, asked) != identity:
        beneath.make_dirs(fd, IDENTITIES)
        _write(fd, _identity_name(asked), json.dumps(identity).encode())


def _remembered(fd: int, asked: str) -> str | None:
    try:
        identity = from_json(_read(fd, _identity_name(asked)))
    except (OSError, ValueError):  # none yet, or damaged: it is only a guess
        return None
    return identity if isinstance(identity, str) else None


def _identity_name(asked: str) -> str:
    return f"{IDENTITIES}/{hashlib.sha256(asked.encode()).hexdigest()}.json"


def _folder(config: EmbeddingCacheConfig) -> Path:
    assert config.path is not None
    return Path(config.path).expanduser() / FOLDER


def _name(identity: str, caption: Caption) -> str:
    text, length, *loras = caption
    adapted = "".join(f" {lora.digest}:{float(lora.weight)!r}" for lora in loras)
    key = hashlib.sha256(f"{identity}\n{length}{adapted}\n{text}".encode()).hexdigest()
    return f"{key[:2]}/{key}.safetensors"
