"""When a call is recorded, replayed and forgotten, with a recorder that needs no GPU."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence

import pytest
import torch

from tests.support.reference import captions, noise
from zimage_runner.engines.faults import is_out_of_memory
from zimage_runner.engines.native import graphs as module
from zimage_runner.engines.native import model as model_module
from zimage_runner.engines.native.graphs import CudaGraphCall, Function, GraphCache
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


OUT_OF_MEMORY = torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 32.00 MiB"


class Failing(Recorder):
    """Raises at the first captures; holds a tensor then, as a half-made recording does."""

    def __init__(self, error: type[Exception], text: str, failures: int = 1) -> None:
        super().__init__()
        self.error, self.text, self.failures = error, text, failures
        self.held: weakref.ref[torch.Tensor] | None = None

    def __call__(self, function: Function, inputs: Sequence[torch.Tensor]):
        if not self.failures:
            return super().__call__(function, inputs)
        self.failures -= 1
        activations = torch.empty(3)
        self.held = weakref.ref(activations)
        raise self.error(self.text)


def test_a_recording_that_does_not_fit_is_done_without() -> None:
    recorder = Failing(*OUT_OF_MEMORY)
    cache = GraphCache(4, recorder)
    run(cache, "a")

    def function(x: torch.Tensor) -> torch.Tensor:
        assert recorder.held is None or recorder.held() is None, "the failed recording's tensors are still there"
        return 2 * x

    x = torch.ones(2)
    assert torch.equal(cache.call("a", function, (x,)), 2 * x)
    assert recorder.held is not None
    assert len(cache) == 0
    run(cache, "a")
    assert recorder.captures == 0, "it was tried again"
    run(cache, "b")
    run(cache, "b")
    assert (recorder.captures, recorder.replays) == (1, 3), "another shape may fit"


def test_a_recording_that_cannot_be_made_is_told_and_ends_recording(caplog) -> None:
    recorder = Failing(RuntimeError, "operation not permitted when stream is capturing")
    cache = GraphCache(4, recorder)
    with caplog.at_level(logging.WARNING, logger="zimage_runner"):
        for key in ("a", "a", "a", "b", "b"):
            run(cache, key)
    assert recorder.captures == 0
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graphs from now on: one could not be recorded "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]


def test_given_up_recordings_are_not_made_again_but_others_are() -> None:
    recorder = Recorder()
    cache = GraphCache(4, recorder)
    assert not cache.give_up()
    run(cache, "a")
    run(cache, "a")
    assert cache.give_up()
    assert not cache.give_up()
    assert len(cache) == 0
    for key in ("a", "a", "b", "b"):
        run(cache, key)
    assert (recorder.captures, len(cache)) == (2, 1)
    cache.clear()
    run(cache, "a")
    run(cache, "a")
    assert len(cache) == 0, "another network's recordings need as much memory"


class Device:
    """What CUDA and torch's allocator are told, and how they answer while a graph is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.invalid = self.ended = False
        device = self

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                device.told.append(f"begin in {pool}, {capture_error_mode}")

            def capture_end(self) -> None:
                device.told.append("end")
                if device.invalid:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def reset(self) -> None:
                device.told.append("reset")

            def replay(self) -> None:
                device.told.append("replay")

        def end_allocate(index: int, pool: object) -> None:
            if device.ended:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            device.told.append(f"allocator ends {pool}")

        for owner, name, answer in (
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "synchronize", lambda: self.told.append("synchronize")),
            (torch.cuda, "empty_cache", lambda: self.told.append("empty cache")),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (module, "capture_stream", lambda: None),
            (torch._C, "_cuda_clearCublasWorkspaces", lambda: self.told.append("clear workspaces")),
            (torch._C, "_cuda_endAllocateToPool", end_allocate),
            (torch._C, "_cuda_releasePool", lambda index, pool: self.told.append(f"allocator releases {pool}")),
        ):
            monkeypatch.setattr(owner, name, answer, raising=False)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        self.told.append("function")
        if self.failing and "end" not in self.told and self.told.count("function") == 2:
            error, text = OUT_OF_MEMORY
            raise error(text)
        return 2 * x

    failing = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


RECORDED = ["function", "synchronize", "empty cache", "begin in pool, thread_local", "function", "end"]


def test_room_is_made_before_a_recording_and_work_areas_are_freed_after_it(device: Device) -> None:
    x = torch.ones(2)
    call = CudaGraphCall(device.call, [x], "pool")
    assert device.told == [*RECORDED, "clear workspaces"]
    assert torch.equal(call([x]), 2 * x)


def test_running_out_during_a_recording_ends_it(device: Device) -> None:
    device.failing = True
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphCall(device.call, [torch.ones(2)], "pool")
    assert device.told == [*RECORDED, "reset", "clear workspaces"]


@pytest.mark.parametrize("ended", [False, True], ids=["before the allocator", "after it"])
def test_an_invalid_recording_does_not_leave_the_allocator_recording(device: Device, ended: bool) -> None:
    device.failing = device.invalid = True
    device.ended = ended
    with pytest.raises(RuntimeError, match="previous error during capture") as error:
        CudaGraphCall(device.call, [torch.ones(2)], "pool")
    assert is_out_of_memory(error.value)
    mended = [] if ended else ["allocator ends pool", "allocator releases pool"]
    assert device.told == [*RECORDED, *mended, "reset", "clear workspaces"]


def test_a_pool_whose_recordings_are_gone_is_not_used_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter("12345")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    cache = GraphCache(2)
    for key in ("a", "a", "b", "b"):
        cache.call(key, double, (torch.ones(2),))
    cache.give_up()
    cache.call("c", double, (torch.ones(2),))
    cache.call("c", double, (torch.ones(2),))
    assert [told.split()[2] for told in device.told if told.startswith("begin")] == ["1,", "1,", "2,"]
    one = GraphCache(1)
    for key in ("a", "a", "b", "b"):
        one.call(key, double, (torch.ones(2),))
    assert [told.split()[2] for told in device.told if told.startswith("begin")][3:] == ["3,", "4,"]
