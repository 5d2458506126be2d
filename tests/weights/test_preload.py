"""Preloading against a driver made of host memory: every byte arrives, failures surface, nothing hangs."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import threading
from pathlib import Path

import pytest

from tests.support.fake_cuda import on_device, pinned
from zimage_runner.weights.preload import pinned_buffers, preload
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable, allocated_bytes
from zimage_runner.weights.preload.preload import Preload

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the fake driver")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_buffers, "CHUNK_BYTES", 4096)


def content(name: str, size: int) -> bytes:
    return (name.encode() * (size // len(name) + 1))[:size]


def test_every_byte_arrives(driver: CudaDriver, tmp_path: Path, pace: None) -> None:
    sizes = {"text_encoder": 100_001, "transformer": 1_000_000, "empty": 0, "vae": 4096}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"header!!" + content(name, size))
    load = Preload([(tmp_path / name, 8, size) for name, size in sizes.items()], driver=driver)
    for name, size in sizes.items():
        assert on_device(load.take(tmp_path / name)) == content(name, size)
    assert load.seconds.keys() == {tmp_path / name for name, size in sizes.items() if size}


@pytest.mark.parametrize("taken", [0, 3])
def test_memory_pinned_ahead_is_used_and_given_back(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    ahead = pinned_buffers.PinnedAhead()
    monkeypatch.setattr(pinned_buffers, "pinned_ahead", ahead)
    ahead.fill(driver)
    assert pinned(driver) == 2 * pinned_buffers.THREADS
    others = [ahead.take() for _ in range(taken)]
    (tmp_path / "a").write_bytes(content("a", 1_000_000))
    load = Preload([(tmp_path / "a", 0, 1_000_000)], driver=driver)
    assert on_device(load.take(tmp_path / "a")) == content("a", 1_000_000)
    assert pinned(driver) == taken
    assert all(others)
    assert ahead.take() is None


def test_nothing_is_pinned_once_it_has_no_use(driver: CudaDriver) -> None:
    for early in (pinned_buffers.PinnedAhead.close, pinned_buffers.PinnedAhead.take):
        ahead = pinned_buffers.PinnedAhead()
        early(ahead)
        ahead.fill(driver)
        assert pinned(driver) == 0
    ahead = pinned_buffers.PinnedAhead()
    ahead.fill(driver)
    ahead.close()
    assert pinned(driver) == 0


def test_memory_outside_torch_is_counted(driver: CudaDriver, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    before = allocated_bytes()
    buffer = Preload([(tmp_path / "a", 0, 10_000)], driver=driver).take(tmp_path / "a")
    assert allocated_bytes() == before + 10_000
    del buffer
    assert allocated_bytes() == before


def test_the_switch_interval_is_given_back(driver: CudaDriver, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    before = sys.getswitchinterval()
    Preload([(tmp_path / "a", 0, 10)], driver=driver).take(tmp_path / "a")
    assert sys.getswitchinterval() == before


def test_a_file_that_ends_early_is_an_error(driver: CudaDriver, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    load = Preload([(tmp_path / "a", 0, 9000)], driver=driver)
    with pytest.raises(OSError, match=r"a ended at byte 5000 while it was read"):
        load.take(tmp_path / "a")
    load.close()


def test_a_failing_copy_is_an_error(driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL_AFTER", "2")
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    load = Preload([(tmp_path / "a", 0, 100_000)], driver=driver)
    with pytest.raises(CudaUnavailable, match="cuMemcpyHtoDAsync_v2 failed with CUDA error 700"):
        load.take(tmp_path / "a")
    load.close()


def test_after_a_failure_the_device_is_free_for_another_way(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the error, whose traceback knows the loads, is still there."""
    before = allocated_bytes()
    monkeypatch.setenv("FAKE_CUDA_FAIL_AFTER", "2")
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    load = Preload([(tmp_path / "a", 0, 100_000), (tmp_path / "b", 0, 100_000)], driver=driver)
    with pytest.raises(CudaUnavailable):
        load.take(tmp_path / "a")
    load.close()
    assert allocated_bytes() == before
    assert pinned(driver) == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_device_without_room_is_an_error_and_nothing_more(driver: CudaDriver, tmp_path: Path) -> None:
    def full(nbytes: int) -> int:
        raise CudaUnavailable("cuMemAlloc_v2 failed with CUDA error 2")

    driver.allocate = full  # type: ignore[method-assign]
    load = Preload([(tmp_path / "a", 0, 10)], driver=driver)
    with pytest.raises(CudaUnavailable, match="cuMemAlloc_v2"):
        load.take(tmp_path / "a")
    load.close()
    del load
    gc.collect()


def test_threads_that_cannot_be_started_are_an_error(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one)
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    load = Preload([(tmp_path / "a", 0, 100_000)], driver=driver)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        load.take(tmp_path / "a")
    load.close()
    assert pinned(driver) == 0


def test_buffers_that_cannot_be_made_leave_nothing(driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> ctypes.c_void_p:
        raise CudaUnavailable("cuEventCreate failed with CUDA error 2")

    monkeypatch.setattr(driver, "event", failing)
    with pytest.raises(CudaUnavailable, match="cuEventCreate"):
        pinned_buffers.PinnedBuffers(driver, None)
    assert pinned(driver) == 0


def test_buffers_are_kept_until_the_stream_has_done_with_them(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what follows a copy fails, so that no event tells of the copy's end."""
    calls: list[str] = []

    def failing(*_: object) -> None:
        raise CudaUnavailable("cuEventRecord failed with CUDA error 2")

    for name in ("finish", "free_pinned"):
        own = getattr(driver, name)
        monkeypatch.setattr(driver, name, lambda *args, name=name, own=own: calls.append(name) or own(*args))
    monkeypatch.setattr(driver, "record", failing)
    (tmp_path / "a").write_bytes(b"x" * 100)
    buffer = preload.DeviceBuffer(driver, 100)
    with (
        pytest.raises(CudaUnavailable, match="cuEventRecord"),
        pinned_buffers.PinnedBuffers[str](driver, None) as own_buffers,
    ):
        own_buffers.send("a", tmp_path / "a", pinned_buffers.Chunk(0, 100, 0), buffer.address)
    assert calls == ["finish", "free_pinned", "free_pinned"]


def test_without_a_driver_there_is_no_preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "CudaDriver", lambda: CudaDriver(library="libnowhere.so"))
    before = sys.getswitchinterval()
    load = Preload([(tmp_path / "a", 0, 10)])
    with pytest.raises(CudaUnavailable, match=r"libnowhere\.so"):
        load.take(tmp_path / "a")
    load.close()
    assert sys.getswitchinterval() == before
