"""The identity of weights: equal for equal files wherever they lie, different when anything sampled differs."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.model import Model, Source
from zimage_runner.weights.find.digest import BLOCK, BLOCKS, sample_offsets, weights_digest
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import EMBEDDED, resolve

WEIGHTS = "text_encoder/model.safetensors"


def digest(path: Path) -> str:
    return weights_digest(inspect(path))


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_does_not_depend_on_the_place(nano: Path, tmp_path: Path) -> None:
    assert digest(nano) == digest(EMBEDDED)
    (nano / "README.md").write_text("not part of the weights", encoding="utf-8")
    assert digest(Path(shutil.move(nano, tmp_path / "elsewhere"))) == digest(EMBEDDED)


@pytest.mark.parametrize(
    "name", ["transformer/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
)
def test_every_config_counts(nano: Path, name: str) -> None:
    config = json.loads((nano / name).read_text(encoding="utf-8"))
    (nano / name).write_text(json.dumps(config | {"another": 1}), encoding="utf-8")
    assert digest(nano) != digest(EMBEDDED)


@pytest.mark.parametrize("block", [0, 1, BLOCKS // 2, -1])
def test_every_sampled_block_counts(nano: Path, block: int) -> None:
    file = next(f for f in inspect(nano).weights["text_encoder"])
    flip(nano / WEIGHTS, sample_offsets(file.data_start, file.size)[block] + 5)
    assert digest(nano) != digest(EMBEDDED)


def test_first_and_last_byte_count(nano: Path) -> None:
    flip(nano / WEIGHTS, -1)
    one = digest(nano)
    flip(nano / WEIGHTS, inspect(nano).weights["text_encoder"][0].data_start)
    assert len({one, digest(nano), digest(EMBEDDED)}) == 3


def test_header_counts(nano: Path) -> None:
    raw = (nano / WEIGHTS).read_bytes()
    query, key = b'"layers.0.self_attn.q_norm.weight"', b'"layers.0.self_attn.k_norm.weight"'
    assert (raw.count(query), raw.count(key)) == (1, 1)
    (nano / WEIGHTS).write_bytes(raw.replace(query, b"<swapped>").replace(key, query).replace(b"<swapped>", key))
    assert digest(nano) != digest(EMBEDDED)


def test_revision_of_a_local_checkpoint_is_its_digest(nano: Path) -> None:
    checkpoint = resolve(Model(name="l", source=Source.local, path=str(nano)))
    assert checkpoint.digest == digest(EMBEDDED)
    assert checkpoint.revision == checkpoint.digest[:12]


@given(start=st.integers(8, 10**6), length=st.integers(0, 10**10))
def test_samples_are_bounded_and_span_the_file(start: int, length: int) -> None:
    size = start + length
    offsets = sample_offsets(start, size)
    assert len(offsets) <= BLOCKS
    assert offsets == sorted(set(offsets))
    if length:
        assert offsets[0] == start
        assert offsets[-1] + BLOCK >= size
    if length <= BLOCK * BLOCKS:  # small files are read whole
        assert all(after - before <= BLOCK for before, after in itertools.pairwise(offsets))
