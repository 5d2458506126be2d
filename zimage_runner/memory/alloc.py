"""Settings of torch's CUDA caching allocator: one string for PYTORCH_ALLOC_CONF, from text or from named fields."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from dataclasses import dataclass, fields
from typing import Any

from zimage_runner.errors import UserError

log = logging.getLogger(__name__)

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch reads the old name first and, from 2.9, the new one; both get the same value, so that neither can win."""
KNOWN_KEYS = (
    "backend", "max_split_size_mb", "garbage_collection_threshold", "expandable_segments", "roundup_power2_divisions",
    "max_non_split_rounding_mb", "per_process_memory_fraction", "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc", "pinned_use_cuda_host_register", "pinned_use_hip_host_register",
    "pinned_num_register_threads", "pinned_use_background_threads", "pinned_reserve_segment_size_mb",
    "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb", "graph_capture_record_stream_reuse",
    "large_segment_size_mb", "throw_on_cudamalloc_oom",
)  # fmt: skip
"""Keys that torch 2.11 to 2.13 understand; another one would end the run when CUDA starts."""
NEWEST_KNOWN = (2, 13)
"""A later torch may understand more keys: whether it does is its own to say."""
SMALLEST_SPLIT_MB = 20
"""torch refuses a max_split_size_mb that is not larger than its large-block buffer of 20 MiB."""


@dataclass(kw_only=True, slots=True)
class AllocFields:
    """The allocator's settings by name; null leaves torch's default. Rendered to one ``key:value,...`` string."""

    backend: str | None = None
    """native (torch's caching allocator, the default) or cudaMallocAsync (the driver's; ignores the rest)."""
    max_split_size_mb: int | None = None
    """Blocks larger than this are never split; the article's 512. More than 20."""
    garbage_collection_threshold: float | None = None
    """Free unused blocks when this share of the limit is in use, 0 < t < 1; needs per_process_fraction to matter."""
    expandable_segments: bool | None = None
    """Segments that grow in place: the strongest setting against fragmentation."""
    roundup_power2_divisions: int | None = None
    """Round sizes up to 1/n of the next power of two; a power of two."""
    max_non_split_rounding_mb: int | None = None
    """How much larger than asked an unsplit cached block may be. More than 20."""

    def __post_init__(self) -> None:
        if self.backend not in (None, "native", "cudaMallocAsync"):
            raise UserError(f"memory.alloc.backend={self.backend}: use native or cudaMallocAsync")
        for name in ("max_split_size_mb", "max_non_split_rounding_mb"):
            value = getattr(self, name)
            if value is not None and value <= SMALLEST_SPLIT_MB:
                raise UserError(f"memory.alloc.{name}={value} is too small: use more than {SMALLEST_SPLIT_MB}")
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise UserError(
                f"memory.alloc.garbage_collection_threshold={threshold} is out of range: use more than 0, less than 1"
            )
        divisions = self.roundup_power2_divisions
        if divisions is not None and (divisions < 1 or divisions & (divisions - 1)):
            raise UserError(f"memory.alloc.roundup_power2_divisions={divisions} is not a power of two: use 2, 4, 8 ...")
        others = [name for name in self.values() if name != "backend"]
        if self.backend == "cudaMallocAsync" and others:
            raise UserError(
                f"memory.alloc.{others[0]} has no effect with memory.alloc.backend=cudaMallocAsync, which is the "
                "driver's own allocator: use backend=native or leave the other fields null"
            )

    def values(self) -> dict[str, Any]:
        """The fields that are set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def render(self) -> str | None:
        """``key:value,...`` as torch parses it, or None when nothing is set."""
        return ",".join(f"{name}:{value}" for name, value in self.values().items()) or None


def alloc_string(text: str | None, named: AllocFields) -> str | None:
    """The one allocator string of a config; refuses text together with named fields, and what torch cannot parse."""
    rendered = named.render()
    if text is None:
        return rendered
    if rendered is not None:
        raise UserError(
            f"memory.alloc_conf={text!r} and memory.alloc.{next(iter(named.values()))} are both set: use one of the two"
        )
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raise UserError for an allocator string that would end the run when CUDA starts."""
    # Commas inside brackets belong to a value: roundup_power2_divisions:[256:1,512:2].
    for part in re.split(r",(?![^\[]*\])", text):
        key, colon, value = part.partition(":")
        if not colon or not key.strip() or not value.strip():
            raise UserError(f"memory.alloc_conf={text!r}: {part!r} is not key:value, e.g. max_split_size_mb:512")
        if key.strip() not in KNOWN_KEYS and not _is_newer_torch():
            close = difflib.get_close_matches(key.strip(), KNOWN_KEYS, 1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(KNOWN_KEYS[:6])} ..."
            raise UserError(f"memory.alloc_conf={text!r}: torch's allocator has no setting {key.strip()!r}; {hint}")


def _is_newer_torch() -> bool:
    from importlib import metadata  # torch itself may not be imported yet

    try:
        return tuple(map(int, re.findall(r"\d+", metadata.version("torch"))[:2])) > NEWEST_KNOWN
    except metadata.PackageNotFoundError:
        return False


def export(value: str) -> bool:
    """Put the string into the environment; False, with a warning, when torch's allocator has already read its own."""
    # Another thread may be importing torch, which reads the string when CUDA starts: what is not there yet has not.
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if hasattr(cuda, "is_initialized") and cuda.is_initialized():
        if os.environ.get(VARIABLES[0], os.environ.get(VARIABLES[1])) != value:
            log.warning("memory.alloc_conf=%s has no effect: torch's CUDA allocator is already initialised", value)
        return False
    for variable in VARIABLES:
        os.environ[variable] = value
    return True
