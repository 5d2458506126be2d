"""Caption features kept on disk, so that a prompt is encoded once and not once a run.

An entry's name is the sha256 of everything that decides it: text, max_sequence_length, weights, numerics and library
versions. A run whose captions are all here does not load the text encoder (``foresees`` tells before anything is).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError
from zimage_runner.weights.cache import write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

GB = 1e9
FORMAT = 1
TENSOR = "prompt_embeds"
IDENTITIES = "identities"
"""Folder of what numerics and versions came of a configuration last, by the configuration's digest."""
FILL_AFTER_EVICTION = 0.9
"""Evicting a tenth at a time keeps the directory from being listed for each new entry."""


@dataclass(kw_only=True, slots=True)
class EmbeddingCacheConfig:
    """The ``embedding_cache`` fields."""

    path: str | None = None
    """Directory of the cache, which any number of runs may share; null keeps caption features in memory alone."""
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
        self._root = _root(config)
        self._limit = config.max_gb * GB
        self._identity = json.dumps({"format": FORMAT, **identity}, sort_keys=True, default=str)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _remember(self._root, asked, self._identity)
        except OSError as error:
            raise UserError(f"embedding_cache.path={config.path} cannot be made: {error.strerror}") from None
        self._size = sum(size for _, size, _ in self._entries())

    def get(self, text: str, max_sequence_length: int, device: str) -> torch.Tensor | None:
        """The features [L, cap_feat_dim] on ``device``, or None. A damaged entry is removed and counts as missing."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(text, max_sequence_length)
        try:
            tensor = load_file(path, device=device)[TENSOR]
            os.utime(path)
            return tensor
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            log.warning("%s is damaged and encoded again: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(self, text: str, max_sequence_length: int, embeds: torch.Tensor) -> None:
        """Keep the features. A disk that takes no more is told once a call and costs nothing else."""
        from safetensors.torch import save

        path = self._path(text, max_sequence_length)
        data = save({TENSOR: embeds.detach().cpu().contiguous()})
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                file.write(data)
            os.replace(file.name, path)
        except OSError as error:
            log.warning("embedding_cache.path=%s: cannot write (%s)", self._root, error)
            return
        self._size += len(data)
        if self._size > self._limit:
            self._evict()

    def _path(self, text: str, max_sequence_length: int) -> Path:
        return _path(self._root, self._identity, text, max_sequence_length)

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every entry; leftovers of killed processes are among them."""
        found = []
        for path in self._root.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _evict(self) -> None:
        entries = sorted(self._entries())
        self._size = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._size <= FILL_AFTER_EVICTION * self._limit:
                break
            path.unlink(missing_ok=True)
            self._size -= size


def foresees(config: EmbeddingCacheConfig, asked: str, texts: Iterable[tuple[str, int]]) -> bool:
    """Whether each (text, max_sequence_length) is there, if numerics and versions are those that ``asked`` gave last.

    A guess, made before torch is imported: who relies on it must still be able to encode.
    """
    if config.path is None:
        return False
    root = _root(config)
    identity = _remembered(root, asked)
    return identity is not None and all(_path(root, identity, text, length).exists() for text, length in texts)


def _remember(root: Path, asked: str, identity: str) -> None:
    if _remembered(root, asked) != identity:
        write_json(_identity_file(root, asked), identity)


def _remembered(root: Path, asked: str) -> str | None:
    try:
        return json.loads(_identity_file(root, asked).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: it is only a guess
        return None


def _identity_file(root: Path, asked: str) -> Path:
    return root / IDENTITIES / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"


def _root(config: EmbeddingCacheConfig) -> Path:
    assert config.path is not None
    return Path(config.path).expanduser()


def _path(root: Path, identity: str, text: str, max_sequence_length: int) -> Path:
    key = hashlib.sha256(f"{identity}\n{max_sequence_length}\n{text}".encode()).hexdigest()
    return root / key[:2] / f"{key}.safetensors"
