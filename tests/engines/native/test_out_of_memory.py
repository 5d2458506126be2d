"""The embedded model on a device that holds only so many pictures at a time: every batch comes out, and recordings go
before pictures do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.drawing import PARAMS, items, session_config
from zimage_runner.engines.native import graphs as graphs_module
from zimage_runner.engines.native import images
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.engine import NativeEngineAdapter
from zimage_runner.engines.native.graphs import Function, GraphCache
from zimage_runner.engines.native.transformer import Transformer
from zimage_runner.engines.native.vae_decoder import VaeDecoder
from zimage_runner.executors import backoff as ladder_module
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import Batch
from zimage_runner.memory.policies import Resident
from zimage_runner.model import Device
from zimage_runner.session import Session

SMALL = replace(PARAMS, height=32, width=32, num_inference_steps=1)
ENOUGH = 1000


class Room:
    """Counts in pictures: a forward takes as many as its batch, and so does a recording for as long as it lives."""

    def __init__(self) -> None:
        self.size = ENOUGH
        self.for_decoding = 1
        self.computes = True
        """False: nothing but memory is simulated."""
        self.recordings: list[int] = []

    def take(self, pictures: int) -> None:
        held = sum(self.recordings)
        if pictures + held > self.size:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {pictures} more, {held} of {self.size} held")

    def record(self, function: Function, inputs: Sequence[torch.Tensor]):
        """Stands in for a CUDA graph."""
        count = len(inputs[0])
        self.take(2 * count)
        self.recordings.append(count)
        return Recording(self, count, function)


class Recording:
    def __init__(self, room: Room, count: int, function: Function) -> None:
        self.room, self.count, self.function = room, count, function

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        self.room.size, size = ENOUGH, self.room.size  # what it needs, it holds
        try:
            return self.function(*inputs)
        finally:
            self.room.size = size

    def __del__(self) -> None:
        self.room.recordings.remove(self.count)


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    room = Room()
    forward, decode = Transformer.forward, VaeDecoder.forward

    def limited_forward(self: Transformer, latents: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        room.take(len(latents))
        return latents if not room.computes else forward(self, latents, *rest)  # type: ignore[arg-type]

    def limited_decode(self: VaeDecoder, latents: torch.Tensor) -> torch.Tensor:
        room.take(room.for_decoding)
        return decode(self, latents) if room.computes else F.interpolate(latents[:, :3], scale_factor=8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", limited_forward)
        patch.setattr(VaeDecoder, "forward", limited_decode)
        for module in (ladder_module, graphs_module):  # a garbage collection takes longer than all the rest
            patch.setattr(module, "release_unused", lambda: None)
        yield room


@pytest.fixture(scope="module")
def loaded(room: Room) -> Session:
    config = session_config(NativeEngine(device=Device.cpu), Resident())
    session = Session(config, [])
    session.start()
    return session


def recording(session: Session, room: Room) -> Session:
    """The session as on a new device, which has ``room`` for everything and records graphs."""
    assert isinstance(session.engine, NativeEngineAdapter)
    session.engine.model.graphs = GraphCache(4, room.record)
    room.size, room.for_decoding, room.computes = ENOUGH, 1, True
    assert room.recordings == []
    return session


@pytest.fixture
def session(loaded: Session, room: Room) -> Session:
    return recording(loaded, room)


def draw(backoff: MemoryBackoff, *counts: int) -> list[int]:
    """Draw batches of so many pictures; the sizes in which they came out."""
    sizes, seed = [], 0
    for count in counts:
        for result in backoff.run(Batch(items=items(count, SMALL, seed))):
            assert result.images is not None, result.error
            pixels = result.images.wait()
            assert len(pixels) == len(result.items)
            assert all(np.ptp(picture) > 0 for picture in pixels)
            sizes.append(len(result.items))
        seed += count
    return sizes


def test_recordings_go_before_the_batch_is_halved(session: Session, room: Room) -> None:
    room.size = 6
    backoff = MemoryBackoff(session)
    assert draw(backoff, 2, 2) == [2, 2]
    assert room.recordings == [2]
    assert draw(backoff, 6) == [6]
    assert backoff.steps == ["out of memory with 6 pictures of 32x32: CUDA graphs and caches are given up"]
    assert room.recordings == []
    assert draw(backoff, 2, 2, 2) == [2, 2, 2]
    assert room.recordings == [], "what had to be given up is not recorded again"
    assert draw(backoff, 3, 3, 3) == [3, 3, 3]
    assert room.recordings == [3], "what fits is"
    assert len(backoff.steps) == 1
    assert "batch_sizes" not in backoff.report()


def test_a_recording_that_does_not_fit_takes_no_picture_with_it(session: Session, room: Room) -> None:
    room.size = 4
    backoff = MemoryBackoff(session)
    assert draw(backoff, 8, 8, 8) == [4] * 6
    assert backoff.steps == ["out of memory with 8 pictures of 32x32: 4 at a time from now on"]
    assert room.recordings == []


def test_recordings_that_leave_no_room_for_decoding_go(session: Session, room: Room) -> None:
    room.size, room.for_decoding = 8, 6
    backoff = MemoryBackoff(session)
    assert draw(backoff, 4, 4, 4) == [4, 4, 4]
    assert backoff.steps == ["out of memory with 4 pictures of 32x32: CUDA graphs and caches are given up"]


def test_one_picture_that_does_not_fit_fails_and_the_next_is_tried(session: Session, room: Room) -> None:
    room.size = 0
    backoff = MemoryBackoff(session)
    results = [result for _ in range(2) for result in backoff.run(Batch(items=items(1, SMALL)))]
    assert [str(result.error).split(":")[0] for result in results] == ["OutOfMemoryError"] * 2
    assert backoff.steps == [], "tiles are no step for an engine that decodes one by one"
    room.size = 1
    assert draw(backoff, 2) == [1, 1]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), decoding=st.integers(1, 9), counts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_picture_comes_out(loaded: Session, room: Room, size: int, decoding: int, counts: list[int]) -> None:
    session = recording(loaded, room)
    room.size, room.for_decoding, room.computes = size, min(decoding, size), False
    backoff = MemoryBackoff(session)
    sizes = draw(backoff, *counts)
    assert sum(sizes) == sum(counts)
    assert max(sizes) <= size
    assert sum(room.recordings) <= size
    session.free_memory()
    assert room.recordings == []


def test_captions_are_encoded_again_after_running_out(session: Session, room: Room) -> None:
    before = session.encode(["a red apple"], 512)[0].clone()
    assert not session.free_memory(), "on the CPU they take nothing of the GPU"
    assert torch.equal(session.encode(["a red apple"], 512)[0], before)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", None])
def test_pictures_are_copied_to_pageable_memory_where_there_is_no_other(monkeypatch, text: str | None) -> None:
    empty = torch.empty

    def refuse(*shape: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError(text or "Cannot access accelerator device when none is available.")
        return empty(*shape, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", refuse)
    if text is None:
        with pytest.raises(RuntimeError, match="none is available"):
            images.page_locked(torch.Size([2, 3]), torch.uint8)
    else:
        assert images.page_locked(torch.Size([2, 3]), torch.uint8).shape == (2, 3)


def test_many_captions_on_the_gpu_are_worth_another_try(session: Session, monkeypatch) -> None:
    kept = {(str(n), 512): SimpleNamespace(is_cuda=True, nbytes=2e6) for n in range(33)}
    monkeypatch.setattr(session.captions, "_kept", kept)
    assert session.free_memory()
    assert not kept
    assert not session.free_memory()
