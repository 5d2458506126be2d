"""When a call is recorded, replayed and forgotten, with a recorder that needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.native.conftest import captions, noise
from zimage_runner.engines.native import model as model_module
from zimage_runner.engines.native.graphs import Function, GraphCache
from zimage_runner.engines.native.model import NativeModel


class Recorder:
    """Counts captures; a recorded call computes what the function would."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, function: Function, inputs: Sequence[torch.Tensor]):
        self.captures += 1

        def replay(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            self.replays += 1
            return function(*inputs)

        return replay


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def run(cache: GraphCache, key: str, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.full((2,), float(step))
        assert torch.equal(cache.call(key, double, (x,), first=step == 0), 2 * x)


def test_a_shape_is_recorded_when_it_repeats() -> None:
    recorder = Recorder()
    cache = GraphCache(2, recorder)
    run(cache, "a")
    assert (recorder.captures, recorder.replays) == (0, 0)
    run(cache, "a")
    run(cache, "a")
    assert (recorder.captures, recorder.replays) == (1, 6)


def test_the_least_recently_used_is_forgotten() -> None:
    recorder = Recorder()
    cache = GraphCache(2, recorder)
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        run(cache, key)
    assert (len(cache), recorder.captures) == (2, 3)
    run(cache, "a")
    assert recorder.captures == 3, "a was used after b, so b went"
    run(cache, "b")
    assert recorder.captures == 4


def test_capacity_zero_records_nothing() -> None:
    recorder = Recorder()
    cache = GraphCache(0, recorder)
    for _ in range(3):
        run(cache, "a")
    assert recorder.captures == 0


def test_clear_starts_afresh() -> None:
    recorder = Recorder()
    cache = GraphCache(2, recorder)
    run(cache, "a")
    run(cache, "a")
    cache.clear()
    assert len(cache) == 0
    run(cache, "a")
    assert recorder.captures == 1


def test_small_pictures_are_recorded_and_large_ones_are_not(
    native: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(native, "graphs", GraphCache(2, recorder))
    embeds, small, large = captions(5), noise(1, 32, 32), noise(1, 96, 96)
    monkeypatch.setattr(model_module, "RECORDED_TOKENS", 64)
    pictures = [native.denoise(embeds, small, 3) for _ in range(3)]
    assert (recorder.captures, recorder.replays) == (1, 6)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    for _ in range(3):
        native.denoise(embeds, large, 1)
    assert recorder.captures == 1
