"""Preloading against a driver made of host memory: every byte arrives, failures surface, nothing hangs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_runner.weights import preload
from zimage_runner.weights.cuda_driver import CudaDriver, CudaUnavailable, allocated_bytes
from zimage_runner.weights.preload import Preload

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the fake driver")


def build_fake(folder: Path) -> CudaDriver:
    """A CUDA driver of host memory, compiled into a folder."""
    library = folder / "libcuda_fake.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return CudaDriver(library=str(library))


@pytest.fixture
def driver(tmp_path: Path) -> CudaDriver:
    return build_fake(tmp_path)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "CHUNK_BYTES", 4096)


def content(name: str, size: int) -> bytes:
    return (name.encode() * (size // len(name) + 1))[:size]


def on_device(buffer: preload.DeviceBuffer) -> bytes:
    interface = buffer.__cuda_array_interface__
    return ctypes.string_at(interface["data"][0], interface["shape"][0])


def test_every_byte_arrives(driver: CudaDriver, tmp_path: Path) -> None:
    sizes = {"text_encoder": 100_001, "transformer": 1_000_000, "empty": 0, "vae": 4096}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"header!!" + content(name, size))
    load = Preload([(tmp_path / name, 8, size) for name, size in sizes.items()], driver=driver)
    for name, size in sizes.items():
        assert on_device(load.take(tmp_path / name)) == content(name, size)
    assert load.seconds.keys() == {tmp_path / name for name, size in sizes.items() if size}


def pinned(driver: CudaDriver) -> int:
    return ctypes.c_int.in_dll(driver._lib, "fake_pinned").value


@pytest.mark.parametrize("taken", [0, 3])
def test_memory_pinned_ahead_is_used_and_given_back(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    ahead = preload.PinnedAhead()
    monkeypatch.setattr(preload, "pinned_ahead", ahead)
    ahead.fill(driver)
    assert pinned(driver) == 2 * preload.THREADS
    others = [ahead.take() for _ in range(taken)]
    (tmp_path / "a").write_bytes(content("a", 1_000_000))
    load = Preload([(tmp_path / "a", 0, 1_000_000)], driver=driver)
    assert on_device(load.take(tmp_path / "a")) == content("a", 1_000_000)
    assert pinned(driver) == taken
    assert all(others)
    assert ahead.take() is None


def test_nothing_is_pinned_once_it_has_no_use(driver: CudaDriver) -> None:
    for early in (preload.PinnedAhead.close, preload.PinnedAhead.take):
        ahead = preload.PinnedAhead()
        early(ahead)
        ahead.fill(driver)
        assert pinned(driver) == 0
    ahead = preload.PinnedAhead()
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


def test_without_a_driver_there_is_no_preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "CudaDriver", lambda: CudaDriver(library="libnowhere.so"))
    before = sys.getswitchinterval()
    load = Preload([(tmp_path / "a", 0, 10)])
    with pytest.raises(CudaUnavailable, match=r"libnowhere\.so"):
        load.take(tmp_path / "a")
    load.close()
    assert sys.getswitchinterval() == before
