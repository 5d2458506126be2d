"""Whether a command line is sure to draw in this process, told before it is composed.

Composing takes a quarter of a second in which torch's libraries can be opened already. Command lines that might mean
something else wait for their composed config.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from zimage_runner import torch_libraries
from zimage_runner.config.schema import RunConfig
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.help import CONFIG_DIR

HARMLESS = {
    "embedding_cache", "engine", "model", "name", "output", "output_file", "prompt", "prompts", "report", "sampling",
    "seeds", "warmup",
}  # fmt: skip
"""Fields and groups that change neither where pictures are drawn nor what torch reads from the environment."""

TOKENIZER = b"""{
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\\\s+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}
}"""
"""One made of the same parts as the checkpoints'."""
TEXTS = 64
"""Enough for each thread of the tokenizers library to get one."""

ENOUGH_CORES = 4
"""On fewer the linker would slow down composing, and with it the answer to a mistake on the command line."""


def before_composing(argv: Sequence[str]) -> None:
    """Start opening torch's libraries if ``argv`` alone says that they are needed."""
    if _has_cores() and all(_is_harmless(word) for word in argv) and not _files_set_the_allocator():
        _begin()


def after_composing(config: RunConfig) -> None:
    """The same for every other command line."""
    here = isinstance(config.executor, InlineExecutorConfig)
    if here and not config.dry_run and config.resume is None:
        config.memory.apply_environment()
        _begin()


def _begin() -> None:
    _open_what_planning_needs()
    torch_libraries.begin()


def _open_what_planning_needs() -> None:
    """Compiled modules, and what they ask the linker for at their first use: later they would wait until it is done
    with torch, and with them all threads."""
    importlib.import_module("PIL._imaging")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(TOKENIZER)
    tokenizer.encode("a fox")
    tokenizer.encode_batch(["a fox"] * TEXTS)


def _has_cores() -> bool:
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) >= ENOUGH_CORES


def _is_harmless(word: str) -> bool:
    return word in ("-m", "--multirun") or word.partition("=")[0].partition(".")[0] in HARMLESS


def _files_set_the_allocator() -> bool:
    """Its settings are read when torch is opened. If no word of the command line has any, these two files decide."""
    files = (CONFIG_DIR / "config.yaml", CONFIG_DIR / "memory" / "resident.yaml")
    return any("alloc" in path.read_text(encoding="utf-8") for path in files)
