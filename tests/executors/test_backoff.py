from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.support.faulty_session import FaultySession, drawn, item
from zimage_runner.engines.faults import DeviceLost, is_device_lost, is_out_of_memory
from zimage_runner.errors import BadPictureError
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import Batch, BatchResult
from zimage_runner.executors.inline import InlineExecutor, InlineExecutorConfig
from zimage_runner.memory import readings


def draw(batch_sizes: list[int], *, attempt: int = 1) -> tuple[FaultySession, MemoryBackoff, list[BatchResult]]:
    """Draw consecutive seeds in batches of these sizes on one session."""
    session = FaultySession()
    backoff = MemoryBackoff(session)
    results, seed = [], 0
    for size in batch_sizes:
        batch = Batch(items=[item(s) for s in range(seed, seed + size)], attempt=attempt)
        results += backoff.run(batch)
        seed += size
    return session, backoff, results


def test_nothing_wrong(faults):
    faults()
    session, backoff, results = draw([3, 1])
    assert drawn(results) == dict.fromkeys(range(4))
    assert session.calls == [(3, 1, False), (1, 1, False)]
    assert backoff.report() == {}


def test_out_of_memory_halves_and_remembers(faults):
    faults(*({"on": s, "kind": "oom", "above": 2} for s in range(16)))
    session, backoff, results = draw([8, 8])
    assert drawn(results) == dict.fromkeys(range(16))
    # 0: memory is freed after each failure.
    assert [n for n, _, _ in session.calls] == [8, 0, 4, 0, 2, 2, 2, 2, 2, 2, 2, 2]
    assert backoff.report()["batch_sizes"] == {"32x32": 2}
    assert backoff.report()["recovery"] == [
        "out of memory with 8 pictures of 32x32: 4 at a time from now on",
        "out of memory with 4 pictures of 32x32: 2 at a time from now on",
    ]


def test_then_tiles(faults):
    faults(*({"on": s, "kind": "oom"} for s in range(4)))
    session, backoff, results = draw([2, 2])
    assert drawn(results) == dict.fromkeys(range(4))
    assert [c for c in session.calls if c[0]] == [(2, 1, False), (1, 1, False)] + [(1, 1, True)] * 4
    wanted = ["smaller batch for want of memory", "VAE decoded in tiles"]
    assert all(r.details["recovery"] == wanted for r in results)
    assert all(r.details["batch_size"] == 1 for r in results)
    assert backoff.report()["recovery"][-1] == "out of memory with one picture of 32x32: decoding in tiles from now on"


def test_then_the_item_fails_and_the_others_do_not(faults):
    faults({"on": 1, "kind": "oom", "tiles_help": False})
    _, _, results = draw([3])
    errors = drawn(results)
    assert errors[0] is errors[2] is None
    assert errors[1] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB"


def test_what_can_be_freed_is_freed_before_the_batch_is_halved(faults, monkeypatch):
    monkeypatch.setattr(FaultySession, "free_memory", lambda self: self.calls.append((0, 0, False)) or True)
    faults({"on": 1, "kind": "oom", "above": 2})
    session, backoff, results = draw([4])
    assert drawn(results) == dict.fromkeys(range(4))
    assert [n for n, _, _ in session.calls] == [4, 0, 4, 0, 2, 2], "once more, and not again and again"
    freed = "out of memory with 4 pictures of 32x32: CUDA graphs and caches are given up"
    assert backoff.steps == [freed, freed, "out of memory with 4 pictures of 32x32: 2 at a time from now on"]


def test_a_session_without_tiles_tries_one_picture_twice(faults, monkeypatch):
    monkeypatch.setattr(FaultySession, "tiles", False)
    faults({"on": 0, "kind": "oom"}, {"on": 1, "kind": "oom", "times": 1})
    session, backoff, results = draw([1, 1])
    errors = drawn(results)
    assert errors == {0: "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB", 1: None}
    assert [n for n, _, _ in session.calls] == [1, 0, 1, 0, 1, 0, 1]
    assert backoff.report() == {}


def test_all_that_torch_keeps_is_given_back(monkeypatch):
    told = []
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, empty_cache=lambda: told.append("cache")
    )
    torch = SimpleNamespace(
        cuda=cuda, _C=SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: told.append("workspaces"))
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(readings.gc, "collect", lambda: told.append("garbage"))
    readings.release_unused()
    assert told == ["garbage", "workspaces", "cache"], "each makes room that the next gives back"
    cuda.is_initialized = lambda: False
    readings.release_unused()
    assert told[3:] == ["garbage"]


def test_only_the_culprit_fails(faults):
    faults({"on": 1, "kind": "raise", "text": "no"})
    session, _, results = draw([4])
    assert drawn(results) == {0: None, 1: "ValueError: no", 2: None, 3: None}
    assert [n for n, _, _ in session.calls] == [4, 1, 1, 1, 1]


def test_a_second_try_is_marked(faults):
    faults({"on": 0, "kind": "nan", "good_attempt": 2})
    _, _, first = draw([1])
    with pytest.raises(BadPictureError):
        drawn(first)
    _, _, second = draw([1], attempt=2)
    assert drawn(second) == {0: None}
    assert second[0].details["recovery"] == ["VAE decoded in float32"]


def test_a_lost_device_ends_the_run(faults):
    faults({"on": 1, "kind": "lost"})
    with pytest.raises(DeviceLost, match=r"the GPU can no longer be used .*illegal memory access"):
        draw([2])


def test_auto_batch_measures_the_first_picture(faults, monkeypatch):
    from zimage_runner.executors import backoff as module

    class Memory:
        def pictures_that_fit(self, most: int) -> int:
            return min(3, most)

    monkeypatch.setattr(module, "BatchMemory", Memory)
    faults()
    session = FaultySession()
    backoff = MemoryBackoff(session, auto_batch=True)
    assert len(drawn(list(backoff.run(Batch(items=[item(s) for s in range(8)]))))) == 8
    assert [n for n, _, _ in session.calls] == [1, 3, 3, 1]
    assert backoff.report() == {"batch_sizes": {"32x32": 3}}


def test_auto_batch_without_a_gpu_is_one(faults):
    faults()
    executor = InlineExecutorConfig().create(FaultySession, auto_batch=True)
    executor.start()
    assert len(drawn(list(executor.run([Batch(items=[item(s) for s in range(3)])])))) == 3
    assert executor.report()["batch_sizes"] == {"32x32": 1}


def test_inline_needs_start():
    with pytest.raises(RuntimeError, match="not started"):
        list(InlineExecutor(FaultySession).run([]))


class AcceleratorError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (AcceleratorError("unspecified"), False, True),
        (AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True, False),
        (ValueError("CUDA error: quoted in somebody's prompt"), False, False),
        (RuntimeError("shapes do not match"), False, False),
    ],
)
def test_kinds_of_trouble(error, memory, lost):
    assert is_out_of_memory(error) is memory
    assert is_device_lost(error) is lost


def test_running_out_while_recording_a_graph_is_running_out():
    error = AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    assert is_device_lost(error)
    error.__context__ = MemoryError()
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_torch_itself_is_recognised():
    torch = pytest.importorskip("torch")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
